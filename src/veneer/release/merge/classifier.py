"""Merges a classifier: base, adapter and head as one model that plain Transformers loads, its labels in config.json.

PEFT merges in float32 and in memory, since classifiers are small; the sum is rounded once to the precision that is
written. The folder is loaded again before it appears, and has to give the scores of the run.
"""

from collections.abc import Callable
from pathlib import Path

import torch

import veneer
from veneer.config import JobError, UserError
from veneer.config.files import file_sha256
from veneer.config.folder import whole_folder, write_json
from veneer.config.options import require_known
from veneer.engine.head_engine import head_engine
from veneer.model.head_tasks import HEAD_TASKS
from veneer.model.pooling import find_pooling
from veneer.model.quiet import quiet
from veneer.model.tuned import TunedModel
from veneer.release.merge.merged import DTYPES, Merged, copy_licence
from veneer.release.output import require_free, require_space
from veneer.release.redact import name_of
from veneer.release.sentence_transformers import write_sentence_transformers

# Largest difference of logits, as a share of the largest one: rounding, of weights with so many bits.
LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
TOKENS = 16  # of each text that is compared
TEXTS = 8


def merge_classifier(
    tuned: TunedModel, out: Path, dtype: str, on: str, on_done: Callable[[int], None] = lambda done: None
) -> Merged:
    """Write the merged model into a new folder; arguments are those of `merge_into`.

    Raises:
        UserError: the base was quantized and `on` does not say `base`, or the folder is not to be had.
        JobError: the written model gives other scores.
    """
    require_known("--dtype", dtype)
    if tuned.quantization is not None and on != "base":
        raise UserError(
            f"{tuned.name}: --on {on}: a classifier is not merged into a base in 4 bits",
            "merge it into the base as it is: --on base",
        )
    if on not in ("trained", "base"):
        raise UserError(f"--on {on}: a classifier is merged into the base it was trained on", "leave --on out")
    require_free(out)
    live = tuned.load_classifier("cpu", torch.float32)
    count = sum(parameter.numel() for parameter in live.parameters())
    require_space(out, count * DTYPES[dtype].itemsize)
    renderer = tuned.labelled_renderer
    texts = _texts(live.config.vocab_size)
    before = head_engine(tuned.model, live, renderer.tokenizer).scores(texts)
    with quiet():
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted = sum(isinstance(module, BaseTunerLayer) for module in live.modules())
        changed = adapted + sum("modules_to_save" in name for name, _ in live.named_parameters())
        merged = live.merge_and_unload().to(DTYPES[dtype])
    with whole_folder(out) as unfinished:
        with quiet():
            merged.save_pretrained(unfinished)
            renderer.tokenizer.save_pretrained(unfinished)
        if tuned.model.task == "embedding":
            size, most = merged.config.hidden_size, renderer.settings.max_length - 1
            write_sentence_transformers(unfinished, find_pooling(tuned.model), size, most)
        copy_licence(tuned.base_folder, unfinished)
        facts = {"adapter": name_of(tuned.name), "adapter_sha256": file_sha256(tuned.weights), "dtype": dtype}
        write_json(unfinished / "merge.json", facts | {"veneer": veneer.__version__, "passport": tuned.passport})
        difference = _require_scores(unfinished, tuned, texts, before, LIMITS[dtype])
        weights = list(unfinished.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in weights)
    on_done(size)
    return Merged(str(out), dtype, "base", len(merged.state_dict()), changed, size, len(weights), (), None, difference)


def _texts(vocabulary: int) -> list[torch.Tensor]:
    """Return arbitrary tokens, the same each time."""
    numbers = torch.arange(TEXTS * TOKENS) * 7919 % vocabulary
    return list(numbers.view(TEXTS, TOKENS))


def _require_scores(
    folder: Path, tuned: TunedModel, texts: list[torch.Tensor], before: torch.Tensor, limit: float
) -> float:
    """Return the largest difference from the adapter's scores.

    Raises:
        JobError: it is beyond the limit.
    """
    with quiet():
        plain = HEAD_TASKS[tuned.model.task].auto_class.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
        )
    after = head_engine(tuned.model, plain, tuned.labelled_renderer.tokenizer).scores(texts)
    difference, most = (before - after).abs().max().item(), limit * max(1.0, before.abs().max().item())
    if not difference <= most:
        raise JobError(
            f"the merged model gives other scores: logits differ by {difference:.3g} (limit {most:.3g})\n"
            "  fix: write float32 with --dtype"
        )
    return difference
