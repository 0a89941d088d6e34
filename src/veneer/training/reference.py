"""The reference of a run that prefers answers: what it compares with, given to the rows when `train.reference` says so.

`reference_logprobs` computes log-probabilities, `reference_cache` keeps them on disk, and `kl_estimate` estimates how
far the model has gone from them. Of a run whose objective compares with nothing, all of this does nothing.
"""

from functools import partial

from veneer.config import Run
from veneer.config.notify import notify
from veneer.data.batch import Batches
from veneer.engine.interface import Engine
from veneer.engine.objective import Objective
from veneer.machine.batching import Batching
from veneer.machine.ranks import ALONE, Ranks
from veneer.training.held_out import HeldOutRows
from veneer.training.kl_estimate import KLEstimate
from veneer.training.parts import RunParts
from veneer.training.reference_cache import facts_of, read_or_measure
from veneer.training.reference_logprobs import completes_batches, describe_reference, give_none, measure_reference


class Reference:
    """Gives the rows of a run their reference; the model is the reference when this is made.

    Args:
        run: the settings.
        parts: the run's parts.
        objective: the run's objective.
        engine: engine of the run.
        batches: steps over the training rows.
        held_out: held-out rows.
        batching: batches in which held-out rows are measured.
        ranks: this process among those of the run.

    Attributes:
        complete: function that gives a batch its reference where that is live, and leaves it as it is elsewhere.
        beta: weight of the log-ratios to the reference; None: the run compares with none, or has no such weight.
    """

    def __init__(
        self,
        run: Run,
        parts: RunParts,
        objective: Objective,
        engine: Engine,
        batches: Batches,
        held_out: HeldOutRows,
        batching: Batching,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._run, self._parts, self._engine, self._batches = run, parts, engine, batches
        self._held_out, self._batching = held_out, batching
        self._is_due = objective.needs_reference
        compares = objective.needs_reference and run.train.reference != "none"
        self.beta: float | None = getattr(objective, "beta", None) if compares else None
        self.complete = completes_batches(run.train, objective, parts.model, engine)
        sizes = run.train.per_device_train_batch_size, run.data.max_length, run.train.seed
        self._kl = KLEstimate(engine, parts.data, batches, held_out, *sizes, ranks) if objective.needs_kl else None
        if objective.needs_reference:
            notify(describe_reference(run, parts.data), "info", "model.adapter")

    def give(self) -> None:
        """Give the examples their reference, once, while the model still is what training starts from."""
        if not self._is_due:
            return
        self._is_due = False
        run, parts, batches = self._run, self._parts, self._batches
        if run.train.reference == "none":
            give_none(parts.data)
        if run.train.reference != "cached":
            return
        steps = batches.steps(run.train.num_train_epochs, run.train.max_steps)
        facts = facts_of(run, parts.machine, parts.source, parts.model, self._engine, parts.data, batches, steps)
        data, held_out = parts.data, self._held_out
        read_or_measure(
            facts,
            data,
            partial(measure_reference, self._engine, data, batches, steps, held_out, self._batching, self._ranks),
            self._ranks,
        )
        if self._kl is not None:
            self._kl.measure_reference(steps)

    def estimate_kl(self, step: int | None) -> dict[str, float]:
        """Return the KL divergence over a step's rows, by name, for objectives that need it; None: of held-out rows."""
        return {} if self._kl is None else self._kl(step)
