"""What leaves the house: passport, card, merged models, GGUF files, and the proof that they are what was trained.

weights.py   safetensors read and written with one tensor in memory at a time
passport.py  passport.json of an adapter: what it belongs to
tuned.py    an adapter with its base: what a release is made from
output.py    a folder to be written, checked before any work
redact.py    what of a run's files may leave the machine
merge/       base and adapter as one model on disk; and the inverse
gguf/        the same as one GGUF file, or the adapter alone
certify/     the proof that an artifact answers as the model that was judged
publish/     the model card, and the upload
"""

from typing import TYPE_CHECKING

from veneer.lazy import import_on_use

if TYPE_CHECKING:
    from veneer.release.certify.artifact import find_artifact
    from veneer.release.certify.best_base import choose_base
    from veneer.release.certify.certificate import Certificate, certify_artifact, write_certificate
    from veneer.release.certify.judged import judged_by, recorded_answers
    from veneer.release.certify.prompts import Prompt, prompts_of, very_long
    from veneer.release.gguf.export import Exported, export_adapter, export_model
    from veneer.release.gguf.importance import IMPORTANCE_ROWS, Importance, measure_importance
    from veneer.release.gguf.types import takes_importance
    from veneer.release.merge.merged import Merged, merge_into, require_model, unmerge_from
    from veneer.release.passport import write_passport
    from veneer.release.publish.card import renew_card, write_card

__all__ = [
    "IMPORTANCE_ROWS",
    "Certificate",
    "Exported",
    "Importance",
    "Merged",
    "Prompt",
    "certify_artifact",
    "choose_base",
    "export_adapter",
    "export_model",
    "find_artifact",
    "judged_by",
    "measure_importance",
    "merge_into",
    "prompts_of",
    "recorded_answers",
    "renew_card",
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
        "Certificate": "veneer.release.certify.certificate",
        "Exported": "veneer.release.gguf.export",
        "IMPORTANCE_ROWS": "veneer.release.gguf.importance",
        "Importance": "veneer.release.gguf.importance",
        "Merged": "veneer.release.merge.merged",
        "Prompt": "veneer.release.certify.prompts",
        "certify_artifact": "veneer.release.certify.certificate",
        "choose_base": "veneer.release.certify.best_base",
        "export_adapter": "veneer.release.gguf.export",
        "export_model": "veneer.release.gguf.export",
        "find_artifact": "veneer.release.certify.artifact",
        "judged_by": "veneer.release.certify.judged",
        "measure_importance": "veneer.release.gguf.importance",
        "merge_into": "veneer.release.merge.merged",
        "prompts_of": "veneer.release.certify.prompts",
        "recorded_answers": "veneer.release.certify.judged",
        "renew_card": "veneer.release.publish.card",
        "require_model": "veneer.release.merge.merged",
        "takes_importance": "veneer.release.gguf.types",
        "unmerge_from": "veneer.release.merge.merged",
        "very_long": "veneer.release.certify.prompts",
        "write_card": "veneer.release.publish.card",
        "write_certificate": "veneer.release.certify.certificate",
        "write_passport": "veneer.release.passport",
    },
)
