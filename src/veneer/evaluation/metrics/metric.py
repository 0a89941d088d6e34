"""Defines a metric: it turns a model's answered rows into results with an interval and a paired difference.

Two models are compared on the same rows, and some rows are hard for both: so a difference is computed from the rows of
both, and not from two intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from veneer.config import Evaluate
from veneer.evaluation.paired import paired
from veneer.training.intervals import Interval, proportion

DEFAULTS = Evaluate()


@dataclass(frozen=True)
class Sample:
    """One held-out row with an answer; `choices`: possible answers that the row names."""

    place: str
    prompt: str
    reference: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoredRows:
    """The answers and losses of one model on the held-out rows.

    Attributes:
        samples: Rows that ask something, with the model's answers.
        losses: Summed loss of each row, in nats; empty: not measured.
        tokens: Trained tokens of each row, in the order of `losses`.
        bytes: UTF-8 bytes of those tokens' text.
        choices: Summed loss of each possible answer, of each sample; empty: not measured.
        settings: Settings of metrics: `extract` and `json_schema`.
    """

    samples: Sequence[Sample]
    losses: Sequence[float] = ()
    tokens: Sequence[float] = ()
    bytes: Sequence[float] = ()
    choices: Sequence[Mapping[str, float]] = ()
    settings: Evaluate = DEFAULTS


class MetricResult(Protocol):
    """One model's result by one metric."""

    @property
    def unit(self) -> str:
        """The unit: share, which is shown in percent; empty: the value is shown as it is."""

    @property
    def better(self) -> str:
        """The better values: higher or lower; empty: the metric describes and does not judge."""

    @property
    def interval(self) -> Interval:
        """The value with its 95% interval."""

    def difference(self, base: Any) -> Interval:
        """Subtract the result of another model on the same rows, with an interval that pairs the rows."""


def needs_answers(rows: ScoredRows) -> str:
    """Return why rows cannot carry a metric of answers; empty: they can."""
    return "" if rows.samples else "the rows are texts that ask nothing, so there is no answer to compare with"


def needs_nothing(rows: ScoredRows) -> str:
    """Return the empty reason: any row has a loss."""
    return ""


@dataclass(frozen=True)
class Metric:
    """A metric that `evaluate.metrics` can name.

    Attributes:
        name: Name in the settings.
        measure: Function from rows to results by name: several where the rows decide what is measured, the one that
            stands for the metric first; none where what it reads was not measured.
        lacks: Function from rows, not answered yet, to the reason why they cannot carry the metric; empty: they can.
        reads: Source of its values: answers, losses, or choices (losses of all possible answers).
        library: Library of the extra `veneer[metrics]` that it imports.
    """

    name: str
    measure: Callable[[ScoredRows], Mapping[str, MetricResult]]
    lacks: Callable[[ScoredRows], str] = needs_answers
    reads: str = "answers"
    library: str = ""


@dataclass(frozen=True)
class Share:
    """The share of rows of which something is true; `true` says it of each row."""

    true: Sequence[bool]
    unit: ClassVar[str] = "share"
    better: ClassVar[str] = ""

    @property
    def interval(self) -> Interval:
        return proportion(sum(self.true), len(self.true))

    def difference(self, base: "Share") -> Interval:
        return paired(base.true, self.true).difference


@dataclass(frozen=True)
class ShareRight(Share):
    """The share of rows that are right."""

    better: ClassVar[str] = "higher"
