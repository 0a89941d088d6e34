"""Exports an adapter as a GGUF file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from veneer.api.merge import chosen_base
from veneer.config import UserError
from veneer.config.notify import notify
from veneer.config.options import require_known
from veneer.config.task import require_answers
from veneer.data.pipeline import prepare
from veneer.model.tuned import TunedModel, find_tuned
from veneer.release.gguf.export import Exported, export_adapter, export_model
from veneer.release.gguf.importance import IMPORTANCE_ROWS, Importance, measure_importance
from veneer.release.gguf.types import takes_importance


def export(
    run: str,
    out: str | Path,
    file_format: str = "gguf",
    quant: str = "q8_0",
    on: str = "trained",
    adapter_only: bool = False,
    base: str | None = None,
    force: bool = False,
    on_done: Callable[[int], None] = lambda done: None,
    imatrix: bool = True,
) -> Exported:
    """Write a GGUF file with its Modelfile: see `veneer.release.gguf.export`.

    Example:
        exported = veneer.export("runs/tickets", "shipped/gguf", quant="q8_0")

    Args:
        run: Folder of a finished run, or of an adapter.
        out: A new folder.
        file_format: gguf.
        quant: Type of the weights.
        on: Base to merge into, as for `merge`.
        adapter_only: Write the adapter alone.
        base: Another base than the adapter names.
        force: Continue although the adapter does not belong to the base.
        on_done: Callback that gets the number of bytes just written.
        imatrix: Whether types of 2 to 6 bits use an importance matrix of the run's own training rows.

    Raises:
        UserError: The architecture, the tokenizer or the type cannot be exported, or as `merge`; nothing was written.
    """
    require_known("--format", file_format)
    tuned = find_tuned(run, base, force)
    require_answers(tuned.model, "veneer export")
    if adapter_only:
        return export_adapter(tuned, Path(out), on_done)
    on, choice = chosen_base(tuned, on)
    importance = _importance(tuned) if imatrix and takes_importance(quant) else None
    return replace(export_model(tuned, Path(out), quant, on, on_done, importance), choice=choice)


def _importance(tuned: TunedModel) -> Importance | None:
    """Measure the importance matrix on a run's training rows; None where there is no run, or its data is gone."""
    if tuned.run is None:
        return None
    try:
        rows = prepare(tuned.run.data, tuned.renderer, tuned.run.train.seed).train
    except UserError as error:
        notify(f"no importance matrix: {str(error).splitlines()[0]}", where="--imatrix")
        return None
    count = min(IMPORTANCE_ROWS, len(rows))
    return measure_importance(tuned.load(tuned.dtype), [rows[n * len(rows) // count] for n in range(count)])
