"""Judges each step's loss and gradient, and keeps what a run has done about those that diverged.

A number that is not finite is a divergence. So is a spike that is far too high, or several spikes in a row; one spike
alone may be a hard row, and is told. And so is a loss that stays at twice what it was: the median of the last few
steps' losses against the first step's, and against the lowest such median before, since the first step may be an easy
one.

A spike is a loss whose robust z-score is high: its distance from the median of the last steps' losses in spreads, where
a spread is 1.4826 times their median absolute deviation (the standard deviation of a normal distribution). Late in a
training losses are small and all alike, so that any hard row would be a spike: a spread counts as a tenth of the loss
at the start at least. No spike is looked for in the first steps, nor is a loss that would be one taken into the median.

All is judged from numbers that the loop reads anyway, before it updates anything: a step that is left out leaves no
trace, whatever the optimizer, and the message can say which of its rows have a loss that is off.
"""

import math
from collections import deque
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from veneer.config import Run, UserError

WINDOW = 64  # losses of the last steps, by which the next one is judged
FIRST = 8  # steps in which no spike is looked for
SPIKE = 10.0  # z-score of a spike
EXTREME = 100.0  # z-score of a spike that is a divergence by itself
PATIENCE = 3  # spikes in a row that are a divergence
NORMAL = 1.4826  # standard deviations in a median absolute deviation
LEAST_SPREAD = 0.1  # of the loss at the start
RECENT = 8  # steps whose median is the level of the loss
LEVEL, DOUBTFUL = 2.0, 1.5  # levels, relative to those before, of a divergence, and of a checkpoint to pass over
MOST_SKIPPED = 5  # updates in a row that are left out before the run ends
MOST_ROLLBACKS = 3
LOWER_RATE = 0.5  # factor of the learning rate at each rollback

Action = Literal["none", "skip", "rollback", "stop"]


@dataclass(frozen=True)
class Finding:
    """A step whose loss or gradient is off.

    Attributes:
        step: the step, counted from 1.
        action: consequence; none: it is told.
        reason: fault, as a clause.
        loss: loss of the step.
        limit: loss beyond which a row's is off, too.
    """

    step: int
    action: Action
    reason: str
    loss: float
    limit: float


@dataclass
class DivergenceState:
    """What a checkpoint keeps.

    Attributes:
        rate_factor: factor of the learning rate, below 1 after a rollback.
        rollbacks: rollbacks so far.
        rolled_to: step that the last one went back to, and no checkpoint was written since; None: there is no such.
        skipped, skipped_in_a_row: updates that were left out.
        spikes_in_a_row: steps until now whose loss was off.
        first, start: loss of the first step, and median of the first few.
        lowest: lowest level of the loss so far.
        recent: losses of the last few steps.
        losses: losses of the last steps, but for spikes.
        is_good: whether nothing was off at the last step.
    """

    rate_factor: float = 1.0
    rollbacks: int = 0
    rolled_to: int | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes_in_a_row: int = 0
    first: float | None = None
    start: float = 0.0
    lowest: float | None = None
    recent: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    is_good: bool = True


class DivergenceWatch:
    """Judges a run's steps, one after the other.

    Args:
        policy: the setting `train.on_divergence`.
        may_overflow: whether gradients may be infinite, since the scaler of a float16 run leaves such updates out.
    """

    def __init__(self, policy: Literal["stop", "skip", "rollback"], may_overflow: bool = False) -> None:
        self.policy = policy
        self._may_overflow = may_overflow
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._state = DivergenceState()

    @property
    def rate_factor(self) -> float:
        """The factor of the learning rate."""
        return self._state.rate_factor

    @property
    def is_good(self) -> bool:
        """Whether nothing was off at the last step."""
        return self._state.is_good

    @property
    def skipped(self) -> int:
        """Updates that were left out."""
        return self._state.skipped

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, for JSON."""
        return asdict(self._state) | {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore what a checkpoint has kept; None: it is of a version that kept nothing."""
        self._state = DivergenceState(**(state or {}))
        self._losses = deque(self._state.losses, WINDOW)

    def judge(self, step: int, loss: float, grad_norm: float) -> Finding | None:
        """Judge a step, counted from 1; None: it is as it should be."""
        state = self._state
        state.first = loss if state.first is None and math.isfinite(loss) else state.first
        state.is_good = False
        off = not math.isfinite(grad_norm) and not self._may_overflow
        if not math.isfinite(loss) or off:
            what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
            return self._found(step, what, loss, acts=True)
        score, level = self._score(loss), self._level(loss)
        state.is_good = score <= SPIKE and level <= DOUBTFUL
        if score <= (SPIKE if step > FIRST else EXTREME):
            self._losses.append(loss)
            if step <= FIRST:
                state.start = median(self._losses)
            state.spikes_in_a_row = 0
            if level > LEVEL:
                now = median(state.recent)
                what = f"the loss stays at {level:.1f} times what it was (median of {RECENT} steps: {now:.4g})"
                return self._found(step, what, loss, acts=True)
            state.skipped_in_a_row = 0
            return None
        state.spikes_in_a_row += 1
        if step <= FIRST:
            return None
        what = f"the loss is {loss:.4g}, {score:.0f} spreads above the median of the last steps ({self._median:.4g})"
        if state.spikes_in_a_row > 1:
            what += f", the {_ordinal(state.spikes_in_a_row)} such step in a row"
        return self._found(step, what, loss, acts=score > EXTREME or state.spikes_in_a_row >= PATIENCE)

    def _found(self, step: int, reason: str, loss: float, acts: bool) -> Finding:
        state = self._state
        action: Action = "none"
        if self.policy == "skip":
            state.skipped += 1
            state.skipped_in_a_row += 1
            action = "skip"
            if state.skipped_in_a_row > MOST_SKIPPED:
                action, reason = "stop", f"{reason}; {MOST_SKIPPED} updates in a row were left out before it"
        elif acts:
            action = self.policy
            if action == "rollback" and state.rollbacks >= MOST_ROLLBACKS:
                action, reason = "stop", f"{reason}; the run went back {MOST_ROLLBACKS} times before"
        return Finding(step, action, reason, loss, self._median + SPIKE * self._spread)

    def rolled_back(self, before: dict[str, Any], step: int) -> None:
        """Note that the state of a checkpoint was restored, this one's too; then the rate is lower.

        Args:
            before: `state_dict` from before that.
            step: step of the checkpoint.
        """
        self._state.rate_factor = before["rate_factor"] * LOWER_RATE
        self._state.rollbacks = before["rollbacks"] + 1
        self._state.rolled_to = step

    @property
    def rolled_to(self) -> int | None:
        """The step that the last rollback went back to."""
        return self._state.rolled_to

    @property
    def rollbacks(self) -> int:
        """Rollbacks so far."""
        return self._state.rollbacks

    @property
    def _median(self) -> float:
        return median(self._losses) if self._losses else self._state.first or 0.0

    @property
    def _spread(self) -> float:
        middle = self._median
        deviation = median(abs(loss - middle) for loss in self._losses) if self._losses else 0.0
        return max(NORMAL * deviation, LEAST_SPREAD * abs(self._state.start or self._state.first or 0.0), 1e-12)

    def _level(self, loss: float) -> float:
        """Return the level of the loss, relative to that of the first step and the lowest one before."""
        state = self._state
        state.recent = [*state.recent, loss][-RECENT:]
        if len(state.recent) < RECENT or state.first is None:
            return 0.0
        level = median(state.recent)
        state.lowest = level if state.lowest is None else min(level, state.lowest)
        highest = max(state.first, state.lowest)
        return level / highest if highest > 0 else 0.0

    def _score(self, loss: float) -> float:
        return (loss - self._median) / self._spread


def is_good(state: dict[str, Any] | None) -> bool:
    """Return whether the state that a checkpoint has kept says nothing of steps that were off."""
    return not state or state["is_good"]


def require_possible(run: Run) -> None:
    """Raise UserError for a policy that the run cannot follow."""
    if run.train.on_divergence == "skip" and run.releases_gradients:
        raise UserError(
            "train.on_divergence = skip: weights are updated within the backward pass (adapter: none, "
            "train.max_grad_norm = 0, train.gradient_accumulation_steps = 1), so that no update can be left out",
            "set train.on_divergence to stop or rollback, or train.max_grad_norm above 0",
        )


def _ordinal(number: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(number, f"{number}th")
