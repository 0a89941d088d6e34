"""Tells of a step that diverged: what was off, which of its rows have a loss that is off, and what follows.

The rows are named by their places in the files, as the ledger names them. Their losses are measured again, each by
itself, with weights that are still good: so one bad row is told from a rate that is too high.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from veneer.config import JobError, Train
from veneer.config.notify import notify
from veneer.data.batch import Batch, Batches
from veneer.engine.interface import Engine, document_losses
from veneer.machine.batching import is_out_of_memory
from veneer.training.divergence import LOWER_RATE, MOST_ROLLBACKS, Finding

SHOWN = 8  # rows that a message names
MOST_TOLD = 5  # steps whose update was left out, each told by itself
WHERE = "train.on_divergence"


class DivergenceMessages:
    """What a run says of its steps that diverged.

    Args:
        train: The settings.
        is_float16: Whether it computes in float16.
    """

    def __init__(self, train: Train, is_float16: bool) -> None:
        self._train = train
        self._is_float16 = is_float16
        self._spikes = self._skipped = 0

    def is_due(self, finding: Finding) -> bool:
        """Return whether a step is told: of spikes the first, of updates that were left out the first few."""
        self._spikes += finding.action == "none"
        self._skipped += finding.action == "skip"
        return {"none": self._spikes == 1, "skip": self._skipped <= MOST_TOLD}.get(finding.action, True)

    def tell(self, finding: Finding, done: int, rows: str, rollbacks: int) -> None:
        """Tell of a step.

        Args:
            finding: Finding about it.
            done: Steps that are done now.
            rows: Sentence on its rows.
            rollbacks: Rollbacks so far.

        Raises:
            JobError: The run ends with it.
        """
        what = f"step {finding.step} diverged: {finding.reason}\n  {rows}"
        if finding.action == "stop":
            raise JobError(f"{what}\n  fix: {self._fix()}")
        if finding.action == "skip":
            last = "; further ones are counted only" if self._skipped == MOST_TOLD else ""
            notify(f"{what}\n  its update is left out{last}", where=WHERE)
        elif finding.action == "rollback":
            notify(
                f"{what}\n  the run goes back to its checkpoint of step {done} and on with {LOWER_RATE:g} times the "
                f"learning rate (rollback {rollbacks} of at most {MOST_ROLLBACKS})",
                where=WHERE,
            )
        else:
            notify(
                f"step {finding.step}: {finding.reason}\n  {rows}\n  one such step may be a hard row, and the run goes "
                "on; further ones are only written to metrics.jsonl, unless they come in a row",
                where=WHERE,
            )

    def _fix(self) -> str:
        rate = f"lower train.learning_rate ({self._train.learning_rate:g})"
        dtype = ", or set model.dtype to bfloat16 or float32" if self._is_float16 else ""
        if self._train.on_divergence != "stop":
            return f"{rate}{dtype}, or mend rows that are off"
        return (
            f"{rate}{dtype}, or mend rows that are off; --resume train.on_divergence=skip goes on from the last "
            "checkpoint and leaves such updates out, train.on_divergence=rollback goes on with a lower rate"
        )


def record_of(finding: Finding, train_record: Mapping[str, Any], done: int, rate_factor: float) -> dict[str, Any]:
    """Return the `DivergenceRecord` of a step.

    Args:
        finding: Finding about it.
        train_record: The record that it would have had.
        done: Steps that are done now.
        rate_factor: Factor of the learning rate from here on.
    """
    return {
        "kind": "divergence",
        "step": done,
        "diverged_step": finding.step,
        "action": finding.action,
        "reason": finding.reason,
        "loss": finding.loss if math.isfinite(finding.loss) else None,
        "grad_norm": train_record["grad_norm"],
        "learning_rate": train_record["learning_rate"],
        "rate_factor": rate_factor,
    }


def describe_rows(batches: Batches, number: int, engine: Engine | None, limit: float) -> str:
    """Return a sentence on the rows of step `number`, counted from 0: those whose loss is off, or all.

    The losses are measured with the weights as they are now, so call it where these are still good.

    Args:
        batches: The training data.
        number: Number of the step.
        engine: Engine that measures the loss of each row; None: no weights are good any more.
        limit: Loss a trained token beyond which a row's is off.
    """
    if engine is None:
        named = list(dict.fromkeys(place for places in batches.places_of_step(number) for place in places))
        return f"its rows: {_listed(named)}"
    losses = _losses(batches, number, engine)
    named = list(losses)
    off = {place: loss for place, loss in losses.items() if not loss <= limit}
    if not off:
        return f"its rows: {_listed(named)}"
    shown = [f"{place} (loss {loss:.4g})" for place, loss in sorted(off.items(), key=lambda one: _order(one[1]))]
    if len(off) == 1:
        return f"of its {len(named)} rows one is off: {shown[0]}"
    if len(off) < len(named) or len(named) == 1:
        return f"of its {len(named)} rows {len(off)} are off: {_listed(shown)}"
    return f"all of its {len(named)} rows are off, which is no row's fault: {_listed(shown)}"


def _losses(batches: Batches, number: int, engine: Engine) -> dict[str, float]:
    """Return the loss a trained token of each row; 0 where it cannot be measured now."""
    losses: dict[str, float] = {}
    for batch, places in zip(batches.step(number), batches.places_of_step(number), strict=True):
        for place, loss in zip(places, _of_documents(batch, engine), strict=True):
            losses[place] = _higher(losses.get(place, -math.inf), loss)
    return losses


def _of_documents(batch: Batch, engine: Engine) -> Sequence[float]:
    try:
        found = document_losses(engine, batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return [0.0] * len(batch.lengths)
    weights = [float(part.sum()) for part in torch.split(batch.weights_T, list(batch.lengths))]
    return [loss / weight if weight else 0.0 for loss, weight in zip(found, weights, strict=True)]


def _higher(one: float, other: float) -> float:
    return other if math.isnan(other) or other > one else one


def _order(loss: float) -> float:
    return -math.inf if math.isnan(loss) else -loss


def _listed(named: Sequence[str]) -> str:
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return ", ".join(named[:SHOWN]) + more
