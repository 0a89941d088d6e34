"""What leaves the house: passport, card, merged models, GGUF files, and the proof that they are what was trained.

weights.py           safetensors read and written with one tensor in memory at a time
passport.py          what an adapter belongs to, and the refusal to load it on anything else
origin.py            an adapter with its base: what a release is made from
adapter_delta.py     what an adapter adds to each tensor of its base, one module at a time
merge_plan.py        the value of each tensor of a merged model, rounded
output.py            a folder to be written, checked before any work
merge.py             base and adapter as one model on disk; and the inverse
gguf_families.py     names, numbers and layouts of a model in llama.cpp
gguf_tokenizer.py    a tokenizer in the words of GGUF
gguf_types.py        the type of each tensor, and its bytes in it
importance.py        which input columns the run's own rows drive hard, for types of few bits
export.py            base and adapter as one GGUF file, or the adapter alone
modelfile.py         template and stop tokens for Ollama
prompts.py           what a certificate asks
runtimes.py          an artifact as its users run it: a folder
servers.py           the same behind HTTP: an OpenAI-compatible server, llama.cpp's among them
compare_weights.py   an artifact's tensors against what they should be
diagnose.py          why an artifact makes other tokens
artifact.py          what is to be certified, by name
judged.py            the model that a run was judged by, and what it answered
checks.py            checks of a certificate that need no second model
settings.py          settings that change answers and stand in no weight
verdict.py           the task's score, row by row against what was judged
agreement.py         next tokens against the judged model's, rounding aside
certify.py           the certificate
best.py              which base a QLoRA adapter is merged into, by what it answers
card.py, lint.py     README.md of an adapter; what vLLM takes
redact.py            what of a run's files may leave the machine
push.py              upload to a hub
"""

from typing import TYPE_CHECKING

from veneer.lazy import import_on_use

if TYPE_CHECKING:
    from veneer.release.artifact import find_artifact
    from veneer.release.best import choose_base
    from veneer.release.card import renew_card, write_card
    from veneer.release.certify import Certificate, certify_artifact, judged_model, write_certificate
    from veneer.release.export import Exported, export_to
    from veneer.release.gguf_types import takes_importance
    from veneer.release.importance import IMPORTANCE_ROWS, Importance, measure_importance
    from veneer.release.judged import judged_by, recorded_answers
    from veneer.release.merge import Merged, merge_into, require_model, unmerge_from
    from veneer.release.origin import Origin, find_origin
    from veneer.release.passport import require_match, write_passport
    from veneer.release.prompts import Prompt, prompts_of, very_long

__all__ = [
    "IMPORTANCE_ROWS",
    "Certificate",
    "Exported",
    "Importance",
    "Merged",
    "Origin",
    "Prompt",
    "certify_artifact",
    "choose_base",
    "export_to",
    "find_artifact",
    "find_origin",
    "judged_by",
    "judged_model",
    "measure_importance",
    "merge_into",
    "prompts_of",
    "recorded_answers",
    "renew_card",
    "require_match",
    "require_model",
    "takes_importance",
    "unmerge_from",
    "very_long",
    "write_card",
    "write_certificate",
    "write_passport",
]

__getattr__ = import_on_use(
    __name__,
    {
        "Certificate": "veneer.release.certify",
        "Exported": "veneer.release.export",
        "IMPORTANCE_ROWS": "veneer.release.importance",
        "Importance": "veneer.release.importance",
        "Merged": "veneer.release.merge",
        "Origin": "veneer.release.origin",
        "Prompt": "veneer.release.prompts",
        "certify_artifact": "veneer.release.certify",
        "choose_base": "veneer.release.best",
        "export_to": "veneer.release.export",
        "find_artifact": "veneer.release.artifact",
        "find_origin": "veneer.release.origin",
        "judged_by": "veneer.release.judged",
        "judged_model": "veneer.release.certify",
        "measure_importance": "veneer.release.importance",
        "merge_into": "veneer.release.merge",
        "prompts_of": "veneer.release.prompts",
        "recorded_answers": "veneer.release.judged",
        "renew_card": "veneer.release.card",
        "require_match": "veneer.release.passport",
        "require_model": "veneer.release.merge",
        "takes_importance": "veneer.release.gguf_types",
        "unmerge_from": "veneer.release.merge",
        "very_long": "veneer.release.prompts",
        "write_card": "veneer.release.card",
        "write_certificate": "veneer.release.certify",
        "write_passport": "veneer.release.passport",
    },
)
