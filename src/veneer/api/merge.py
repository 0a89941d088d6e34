"""Merges an adapter into its base, and takes it out again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.api.certify import questions_of
from veneer.config.task import require_answers
from veneer.model.tuned import TunedModel, find_tuned
from veneer.release.certify.best_base import choose_base
from veneer.release.certify.judged import recorded_answers
from veneer.release.merge.classifier import merge_classifier
from veneer.release.merge.merged import Merged, merge_into, require_model, unmerge_from


def merge(
    run: str,
    out: str | Path,
    dtype: str = "bfloat16",
    on: str = "trained",
    base: str | None = None,
    force: bool = False,
    on_done: Callable[[int], None] = lambda done: None,
) -> Merged:
    """Write base and adapter as one model: see `veneer.release.merge.merged`.

    Example:
        merged = veneer.merge("runs/tickets", "shipped/merged")

    Args:
        run: Folder of a finished run, or of an adapter.
        out: A new folder.
        dtype: bfloat16, float16 or float32.
        on: trained: what the run trained on and was judged by; nf4: the base in 4 bits, dequantized; base: the base as
            it is; best: `nf4` or `base`, whichever answers more of the held-out rows right.
        base: Another base than the adapter names.
        force: Continue although the adapter does not belong to the base.
        on_done: Callback that gets the number of bytes just written.

    Raises:
        UserError: They do not fit together, or the folder is not to be had; nothing was written.
    """
    tuned = find_tuned(run, base, force)
    if tuned.model.task != "causal-lm":
        return merge_classifier(tuned, Path(out), dtype, on, on_done)
    on, choice = chosen_base(tuned, on)
    return merge_into(tuned, Path(out), dtype, on, on_done=on_done, choice=choice)


def unmerge(
    merged: str | Path,
    adapter: str,
    out: str | Path,
    force: bool = False,
    on_done: Callable[[int], None] = lambda done: None,
) -> Merged:
    """Take an adapter out of a merged model: what is left is its base, within rounding.

    Raises:
        UserError: As `merge`, or the kind of adapter cannot be taken out.
    """
    require_model(Path(merged))
    # The merged model says all that is needed of its base, which may be gone.
    tuned = find_tuned(adapter, str(merged), force, is_merged=True)
    require_answers(tuned.model, "veneer unmerge")
    return unmerge_from(Path(merged), tuned, Path(out), force, on_done)


def chosen_base(tuned: TunedModel, on: str) -> tuple[str, dict[str, Any] | None]:
    """Choose the base to merge into; returns it with what `--on best` measured."""
    if on != "best":
        return on, None
    prompts, longest, _ = questions_of(tuned, None)
    choice = choose_base(tuned, prompts, longest, recorded_answers(tuned))
    return choice.on, choice.as_dict()
