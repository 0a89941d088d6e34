"""Base against tuned, metric by metric: the difference, how sure it is, and a verdict.

Rows are compared in pairs. What is measured of each row is subtracted row by row, since some rows are hard for both
models, and only where they differ do they say which is better. Rows that share a group (`evaluate.group`) are
observations of one thing, and count as the number of independent rows that they are worth.

    yes or no, or few rows differ    Tango's interval, which agrees with McNemar's test (paired.py)
    any number                       studentized bootstrap of the mean difference (training/bootstrap.py)

The detectable difference is the one that these rows would find in 80 of 100 such comparisons. It follows from how much
rows differ, and not from who wins, so that it can be read before the result.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from veneer.evaluation.paired import difference, mcnemar
from veneer.training.bootstrap import FEWEST, RESAMPLES, GroupedRows, bootstrap, t_quantile
from veneer.training.intervals import Interval, Z

POWER_Z = Z + 0.841621  # 97.5% and 80% quantiles of the normal distribution
FEW = 5  # rows that differ: a bootstrap of fewer says little
MOST_EVEN = 2.0  # rows that a row in a group may count as, where groups are alike by chance
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class RowValues:
    """What one metric measured of each row.

    Attributes:
        values: number of each row, or whether it is right; their mean is the metric's value
        better: the better values: higher or lower; empty: the metric describes and does not judge
        unit: `share`: values lie between 0 and 1
    """

    values: Any
    better: str = "higher"
    unit: str = ""


@dataclass(frozen=True)
class MetricComparison:
    """The tuned model against the base by one metric.

    Attributes:
        difference: mean of tuned less base, with its 95% interval
        probability: probability that tuned is better; that it is higher, where the metric does not judge
        verdict: better, worse, equal within d, or not shown; higher or lower where the metric does not judge
        detectable: difference that these rows would find in 80 of 100 comparisons
        equal_within: d, below which a difference counts as none
        method: method of the interval
        better_rows, worse_rows: rows that got better and worse, by their number
        rows: number of rows compared
        groups: number of groups that they form; None: each stands alone
        p_mcnemar: p-value of McNemar's exact test; None: the metric is not yes or no, or rows have groups
    """

    difference: Interval
    probability: float
    verdict: str
    detectable: float
    equal_within: float
    method: str
    better_rows: tuple[int, ...]
    worse_rows: tuple[int, ...]
    rows: int
    groups: int | None
    p_mcnemar: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return its part of evaluation.json."""
        return {
            "detectable": self.detectable,
            "difference": self.difference.as_dict(),
            "probability": self.probability,
            "verdict": self.verdict,
            "equal_within": self.equal_within,
            "rows": {
                "compared": self.rows,
                "better": len(self.better_rows),
                "worse": len(self.worse_rows),
                "groups": self.groups,
            },
            "p_mcnemar": self.p_mcnemar,
            "method": self.method,
        }


def compare_metrics(
    base: Mapping[str, RowValues],
    tuned: Mapping[str, RowValues],
    groups: Mapping[str, Sequence[Any]] | None = None,
    equal_within: float | None = None,
) -> dict[str, MetricComparison]:
    """Compare two models by every metric that both have, on the same rows.

    Args:
        base, tuned: Values of each row, by metric.
        groups: Group of each row, by metric; None: each row stands alone.
        equal_within: Setting of that name; None: the detectable difference.

    Returns:
        Comparisons by metric, without those of fewer than two rows or groups and of values that are not finite.
    """
    found = {}
    for name in base:
        if name in tuned:
            compared = compare_rows(base[name], tuned[name], groups[name] if groups else None, equal_within)
            if compared is not None:
                found[name] = compared
    return found


def compare_rows(
    base: RowValues, tuned: RowValues, groups: Any = None, equal_within: float | None = None
) -> MetricComparison | None:
    """Compare two models by one metric on the same rows; None: too few rows, or values that are not finite.

    Args:
        base, tuned: Values of the same rows in the same order.
        groups: Group of each row; None: each row stands alone.
        equal_within: Largest difference that counts as none: of a share as it is, else as a share of the base's value;
            None: the detectable difference.
    """
    base_R, tuned_R = (np.asarray(given.values, dtype=np.float64) for given in (base, tuned))
    if len(base_R) != len(tuned_R):
        raise ValueError(f"{len(base_R)} and {len(tuned_R)} rows cannot be compared in pairs")
    both = np.concatenate([base_R, tuned_R])
    if len(base_R) < FEWEST or not np.isfinite(both).all():
        return None
    apart_R = tuned_R - base_R
    rows = GroupedRows.of(apart_R, groups)
    if len(rows.sums_G) < FEWEST:
        return None
    span = 1.0 if tuned.unit == "share" else float(np.ptp(both))  # the most that a row can differ
    is_yes_no = bool(np.isin(both, (0, 1)).all())
    if is_yes_no or (np.count_nonzero(apart_R) < FEW and span):
        interval, rises, spread = _by_counts(rows, apart_R, span or 1.0, groups is not None)
        method = "Tango's score interval"
    else:
        (interval, rises), spread = bootstrap(rows), rows.standard_error
        method = f"studentized bootstrap, {RESAMPLES} resamples"
    detectable = POWER_Z * spread
    d = detectable if equal_within is None else equal_within * (1 if tuned.unit == "share" else abs(base_R.mean()))
    p = None
    if is_yes_no and groups is None:
        p = mcnemar(int((apart_R > 0).sum()), int((apart_R < 0).sum()))
    up, down = tuple(np.flatnonzero(apart_R > 0).tolist()), tuple(np.flatnonzero(apart_R < 0).tolist())
    is_lower = tuned.better == "lower"
    return MetricComparison(
        interval,
        1 - rises if is_lower else float(rises),
        _verdict(interval, tuned.better, d, p),
        detectable,
        d,
        method + (f", {len(rows.sums_G)} groups" if groups is not None else ""),
        down if is_lower else up,
        up if is_lower else down,
        len(apart_R),
        None if groups is None else len(rows.sums_G),
        p,
    )


def _by_counts(rows: GroupedRows, apart_R: Any, span: float, is_grouped: bool) -> tuple[Interval, float, float]:
    """Return difference, probability that it is above zero, and its standard error, from the rows that differ.

    Args:
        rows: Differences, added up by group.
        apart_R: Differences of the rows, which count as rows that turned, the small ones as parts of one.
        span: The most that a row can differ.
        is_grouped: Whether rows share groups.
    """
    worth = _worth(rows, apart_R) if is_grouped else 1.0
    count = worth * len(apart_R)
    # The size of a turned row, as its square on average: one more of the whole span, which may not have shown yet.
    unit = (float(np.square(apart_R).sum()) + span**2) / (float(np.abs(apart_R).sum()) + span)
    gained, lost = (worth * float(side.clip(min=0).sum()) / unit for side in (apart_R, -apart_R))
    counted = difference(count, gained, lost)
    interval = Interval(unit * counted.value, unit * counted.low, unit * counted.high)
    rises = NormalDist().cdf((gained - lost) / math.sqrt(gained + lost)) if gained + lost else 0.5
    # Two rows more, since by chance none may differ.
    return interval, rises, unit * math.sqrt(gained + lost + 2) / (count + 2)


def _worth(rows: GroupedRows, apart_R: Any) -> float:
    """Return how many independent rows a row in a group is worth (Korn and Graubard 1998).

    It is the variance of the mean without groups over that with them, less what so few groups leave unknown.
    """
    groups = len(rows.sums_G)
    unknown = (Z / t_quantile(0.975, groups - 1)) ** 2
    alone, grouped = float(apart_R.var()) / len(apart_R), rows.standard_error**2
    if not alone:
        return unknown * groups / len(apart_R)  # nothing differs: as if a group were one row
    return min(MOST_EVEN, unknown * alone / grouped) if grouped else unknown


def _verdict(interval: Interval, better: str, d: float, p_mcnemar: float | None) -> str:
    """Return the verdict of an interval; better and worse need McNemar's test to agree, where there is one."""
    rises, falls = {"higher": ("better", "worse"), "lower": ("worse", "better")}.get(better, ("higher", "lower"))
    if p_mcnemar is None or p_mcnemar < SIGNIFICANT:
        if interval.low > 0:
            return rises
        if interval.high < 0:
            return falls
    return f"equal within {d:.3g}" if -d <= interval.low and interval.high <= d else "not shown"
