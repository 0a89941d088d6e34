"""Finds a learning rate before a run: a few rates are each tried for a few steps, and compared by held-out loss.

The rate matters more than the variant of LoRA, and what is right depends on base, data and length of the run. Each rate
of a geometric grid trains the run's own adapter from the same start on the same first rows, with the run's schedule
compressed into the few steps; then its loss on the same held-out rows is measured. All of it takes at most `SHARE` of
what the run takes. Losses are compared in pairs (paired_losses.py). Of rates whose loss is within `TIE` of the lowest
the smallest is taken: few steps favour rates that are too high for many. Pairs of answers have a lower grid, and of the
rates whose loss is not shown to be above the lowest the smallest is taken: few steps change the loss of pairs little.
For full fine-tuning rates are a tenth of LoRA's; some adapter methods have higher ones (`rate_scale`).

Nothing is drawn at random beyond the run's own seed, so that the same run finds the same rate. Afterwards the adapter
is what it was.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from veneer.config import JobError, Run, Train, UserError
from veneer.config.notify import notify
from veneer.data.batch import Batches, Example
from veneer.engine.temporary import preserve_adapter
from veneer.machine.device import release_memory
from veneer.model import full
from veneer.model.adapters import find_method
from veneer.training.held_out import HeldOutRows
from veneer.training.intervals import Interval
from veneer.training.paired_losses import RowLosses, loss_difference

RATES = tuple(float(f"{2e-5 * 10 ** (n / 2):.1e}") for n in range(5))  # 2e-5 to 2e-3
PAIR_RATES = tuple(float(f"{5e-7 * 10 ** (n / 2):.1e}") for n in range(5))  # 5e-7 to 5e-5
SHARE = 0.15  # of the run's cost
HELD_OUT_SHARE = 1 / 3  # of that for measuring, at most
FORWARD = 0.5  # cost of a held-out token relative to a trained one, which goes back as well
LEAST_STEPS, LEAST_ROWS = 4, 8
TIE = 0.01


class BriefLoop(Protocol):
    """A training loop, as the search needs it."""

    def train_briefly(self) -> None: ...


class MakeLoop(Protocol):
    """A function that makes a loop on the run's adapter."""

    def __call__(self, *, train: Train) -> BriefLoop: ...


@dataclass(frozen=True)
class TriedRate:
    """One rate of the grid.

    Attributes:
        rate: Peak learning rate.
        loss: Held-out loss after the few steps, in nats a trained token; None: it diverged.
        difference: Its loss less that of the rate that was taken, with the interval that pairs the rows.
    """

    rate: float
    loss: float | None
    difference: Interval | None


@dataclass(frozen=True)
class RateSearch:
    """What a search found.

    Attributes:
        rate: The rate that is taken.
        steps: Steps that each rate was tried for.
        held_out_rows: Rows that each was measured on.
        share_of_run: Cost of the search as a share of the run's.
        tried: All rates.
    """

    rate: float
    steps: int
    held_out_rows: int
    share_of_run: float
    tried: tuple[TriedRate, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return what plan.json keeps."""
        return asdict(self)

    def describe(self) -> str:
        """Return the finding and its evidence in one line."""
        losses = ", ".join(
            f"{one.rate:g}: " + ("diverged" if one.loss is None else f"{one.loss:.4f}") for one in self.tried
        )
        return (
            f"train.learning_rate = auto: {self.rate:g}, by the loss on {self.held_out_rows} held-out rows after "
            f"{self.steps} steps ({losses}); it took {self.share_of_run:.0%} of the run's cost"
        )


@dataclass(frozen=True)
class SearchBudget:
    """How long each rate is tried.

    Attributes:
        steps: Optimizer steps.
        rows: Held-out rows.
        share: Cost of it all as a share of the run's.
    """

    steps: int
    rows: int
    share: float


def with_rate(run: Run, rate: Any) -> Run:
    """Return the run with another learning rate."""
    return run.model_copy(update={"train": run.train.model_copy(update={"learning_rate": rate})})


def find_rate(
    train: Train,
    batches: Batches,
    held_out: HeldOutRows,
    measure: Callable[[Sequence[Example]], RowLosses],
    model: Any,
    make_loop: MakeLoop,
) -> RateSearch:
    """Find the learning rate of a run.

    Args:
        train: The settings.
        batches: The training data.
        held_out: The held-out rows.
        measure: Function that returns the losses of rows as the adapter is now.
        model: The PEFT model; its adapter is restored.
        make_loop: Function that makes the run's loop with other settings of `train`.

    Raises:
        UserError: There are too few held-out rows, or the run is too short for its share of steps to say anything.
        JobError: No rate trains.
    """
    scale = full.RATE_SCALE if full.is_full(model) else find_method(model.peft_config["default"]).rate_scale
    budget = plan_search(train, batches, held_out, scale)
    # Evenly from the longest to the shortest.
    size = held_out.documents_per_row
    chosen = np.unique(np.linspace(0, len(held_out) // size - 1, budget.rows).round().astype(int)).tolist()
    rows = [held_out[row * size + n] for row in chosen for n in range(size)]
    measured: dict[float, RowLosses | None] = {}
    failure = ""
    for rate in (float(f"{scale * rate:.1e}") for rate in (PAIR_RATES if size > 1 else RATES)):
        brief = train.model_copy(update={"learning_rate": rate, "max_steps": budget.steps})
        with preserve_adapter(model):
            try:
                make_loop(train=brief).train_briefly()
                found = measure(rows)
            except JobError as error:
                failure = str(error)
                measured[rate] = None
            else:
                measured[rate] = found if math.isfinite(found.mean) else None
        release_memory()  # the loop's optimizer is in reference cycles
    search = _choose(measured, budget, failure, are_pairs=size > 1)
    notify(search.describe(), "info", "train.learning_rate")
    return search


def plan_search(train: Train, batches: Batches, held_out: HeldOutRows, scale: float = 1.0) -> SearchBudget:
    """Say how many steps and held-out rows each rate may have.

    Args:
        train: The settings.
        batches: The training data.
        held_out: The held-out rows.
        scale: usual rates of the method, relative to LoRA's.

    Raises:
        UserError: They are too few.
    """
    size = held_out.documents_per_row
    named = f"name a rate in train.learning_rate, such as {scale * (2e-4 if size == 1 else 1e-5):g}"
    count = len(held_out) // size
    if count < LEAST_ROWS:
        raise UserError(
            f"train.learning_rate = auto: rates are compared on held-out rows, of which there are {count}; at "
            f"least {LEAST_ROWS} are needed",
            f"hold more rows out with data.validation, or {named}",
        )
    steps = batches.steps(train.num_train_epochs, train.max_steps)
    step_cost = float(batches.sizes.sum()) / batches.steps_per_epoch
    row_cost = FORWARD * float(held_out.lengths.sum()) / count
    whole = SHARE * steps * step_cost / len(RATES)  # of a rate
    rows = min(count, int(whole * HELD_OUT_SHARE / row_cost))
    tried = int((whole - rows * row_cost) / step_cost)
    if rows < LEAST_ROWS or tried < LEAST_STEPS:
        needed = (LEAST_STEPS * step_cost / (1 - HELD_OUT_SHARE), LEAST_ROWS * row_cost / HELD_OUT_SHARE)
        least = math.ceil(max(needed) * len(RATES) / SHARE / step_cost)
        raise UserError(
            f"train.learning_rate = auto: the run has {steps} steps, too few for {SHARE:.0%} of its cost to tell "
            f"{len(RATES)} rates apart; it needs about {max(least, steps + 1)}",
            f"{named}, or train longer",
        )
    share = (tried * step_cost + rows * row_cost) * len(RATES) / (steps * step_cost)
    return SearchBudget(tried, rows, share)


def _choose(measured: dict[float, RowLosses | None], budget: SearchBudget, failure: str, are_pairs: bool) -> RateSearch:
    trained = {rate: losses for rate, losses in measured.items() if losses is not None}
    if not trained:
        first, last = min(measured), max(measured)
        raise JobError(f"train.learning_rate = auto: no rate from {first:g} to {last:g} trains: {failure}")
    best = min(trained.values(), key=lambda losses: losses.mean)

    def is_as_good(losses: RowLosses) -> bool:
        if are_pairs:
            return loss_difference([losses], [best]).low <= 0
        return losses.mean <= best.mean * (1 + TIE)

    rate = min(rate for rate, losses in trained.items() if is_as_good(losses))
    tried = tuple(
        TriedRate(one, None, None)
        if losses is None
        else TriedRate(one, losses.mean, loss_difference([losses], [trained[rate]]))
        for one, losses in measured.items()
    )
    return RateSearch(rate, budget.steps, len(best.losses), round(budget.share, 4), tried)
