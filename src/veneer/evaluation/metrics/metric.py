"""Defines a metric: it turns a model's answered rows into results with an interval and a paired difference.

Two models are compared on the same rows, and some rows are hard for both: so a difference is computed from the rows of
both, and not from two intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from veneer.evaluation.intervals import Interval, proportion
from veneer.evaluation.paired import paired


@dataclass(frozen=True)
class Sample:
    """One held-out row with an answer."""

    place: str
    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True)
class ScoredRows:
    """The answers and losses of one model on the held-out rows.

    Attributes:
        samples: Rows that ask something, with the model's answers.
        losses: Summed loss of each row; empty: not measured.
        tokens: Trained tokens of each row, in the order of `losses`.
    """

    samples: Sequence[Sample]
    losses: Sequence[float] = ()
    tokens: Sequence[float] = ()


class MetricResult(Protocol):
    """One model's result by one metric."""

    unit: ClassVar[str]  # share: shown in percent; empty: shown as it is

    @property
    def interval(self) -> Interval:
        """The value with its 95% interval."""

    def difference(self, base: Any) -> Interval:
        """Subtract the result of another model on the same rows, with an interval that pairs the rows."""


class Metric(Protocol):
    """A function from rows to results by name: several where the rows decide what is measured, or none."""

    def __call__(self, rows: ScoredRows) -> Mapping[str, MetricResult]: ...


@dataclass(frozen=True)
class ShareRight:
    """The share of rows that are right; `right` has a verdict on each row."""

    right: Sequence[bool]
    unit: ClassVar[str] = "share"

    @property
    def interval(self) -> Interval:
        return proportion(sum(self.right), len(self.right))

    def difference(self, base: "ShareRight") -> Interval:
        return paired(base.right, self.right).difference
