"""Comparisons of two models row by row: known values, verdicts, groups, and how often intervals hold the truth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.judge import coverage

import veneer
from tests.support.runs import tiny_run, write_rows
from veneer.config import UserError
from veneer.evaluation.differences import POWER_Z, MetricComparison, RowValues, compare_metrics, compare_rows
from veneer.evaluation.paired import difference
from veneer.training.bootstrap import GroupedRows, bootstrap, jackknife_values, t_quantile


def turned(gained: int, lost: int, same: int, better: str = "higher") -> MetricComparison:
    base = [0] * gained + [1] * lost + [1] * same
    tuned = [1] * gained + [0] * lost + [1] * same
    found = compare_rows(RowValues(base, better, "share"), RowValues(tuned, better, "share"))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("gained", "lost", "same", "verdict"),
    [
        (10, 0, 30, "better"),
        (0, 10, 30, "worse"),
        (6, 0, 34, "better"),
        (5, 0, 35, "not shown"),  # the interval is above zero, but McNemar's exact p is 2/32
        (10, 10, 180, "equal within 0.0651"),
        (12, 6, 22, "not shown"),
        (0, 0, 40, "equal within 0.0943"),
    ],
)
def test_verdicts_of_yes_or_no(gained: int, lost: int, same: int, verdict: str) -> None:
    found = turned(gained, lost, same)
    rows = gained + lost + same
    assert found.verdict == verdict
    assert found.difference == difference(rows, gained, lost)
    assert (len(found.better_rows), len(found.worse_rows), found.rows) == (gained, lost, rows)
    assert found.detectable == pytest.approx(POWER_Z * (gained + lost + 2) ** 0.5 / (rows + 2))
    opposite = turned(gained, lost, same, "lower")
    assert opposite.verdict == {"better": "worse", "worse": "better"}.get(verdict, verdict)
    assert opposite.probability == pytest.approx(1 - found.probability)
    assert opposite.better_rows == found.worse_rows


def test_a_metric_that_does_not_judge_is_higher_or_lower() -> None:
    assert turned(10, 0, 30, "").verdict == "higher"
    assert turned(0, 10, 30, "").verdict == "lower"


def test_the_setting_says_what_counts_as_equal() -> None:
    rng = np.random.default_rng(0)
    base = 10 + rng.normal(size=100)
    tuned = base + 0.1 * rng.normal(size=100)
    found = compare_rows(RowValues(base), RowValues(tuned), equal_within=0.01)
    assert found is not None
    assert found.equal_within == pytest.approx(0.01 * base.mean()), "of no share: a part of the base's value"
    assert found.verdict.startswith("equal within 0.1")
    narrow = compare_rows(RowValues(base), RowValues(tuned), equal_within=0.0001)
    assert narrow is not None
    assert narrow.verdict == "not shown"


def test_the_bootstrap_is_near_students_interval_and_gives_the_same_bits() -> None:
    values = np.random.default_rng(1).normal(0.5, 1, size=60)
    interval, probability = bootstrap(GroupedRows.of(values))
    half = t_quantile(0.975, 59) * values.std(ddof=1) / 60**0.5
    assert interval.value == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert probability > 0.99
    assert bootstrap(GroupedRows.of(values)) == (interval, probability)
    mirrored, other = bootstrap(GroupedRows.of(-values))
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))
    assert other == pytest.approx(1 - probability, abs=0.01)


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)])
def test_quantiles_of_students_t(freedom: int, quantile: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, rel=0.01)


def test_rows_of_a_group_count_as_one_where_they_are_alike() -> None:
    rng = np.random.default_rng(2)
    for apart in (rng.normal(0.2, 1, size=30), rng.choice([1.0, 0.0, -1.0], size=30, p=[0.4, 0.4, 0.2])):
        base, tuned = (apart < 0).astype(float), (apart < 0) + apart
        alone = compare_rows(RowValues(base), RowValues(tuned))
        before, after = (RowValues(np.repeat(values, 5)) for values in (base, tuned))
        grouped = compare_rows(before, after, groups=np.repeat(np.arange(30), 5))
        wrong = compare_rows(before, after)
        assert alone is not None
        assert grouped is not None
        assert wrong is not None
        assert (grouped.rows, grouped.groups, grouped.p_mcnemar) == (150, 30, None)
        width, without, too_narrow = (one.difference.high - one.difference.low for one in (grouped, alone, wrong))
        assert width == pytest.approx(without, rel=0.1)
        assert too_narrow < 0.6 * width


def test_few_rows_that_differ_are_counted_and_not_drawn() -> None:
    base = np.full(40, 0.5)
    tuned = base.copy()
    tuned[:3] += [0.5, 0.25, -0.5]
    found = compare_rows(RowValues(base, unit="share"), RowValues(tuned, unit="share"))
    assert found is not None
    # A turned row counts 0.694: the sum of squares, 0.5625, over that of sizes, 1.25, with one more row of size 1.
    unit = 1.5625 / 2.25
    counted = difference(40, 0.75 / unit, 0.5 / unit)
    assert (found.difference.low, found.difference.high) == pytest.approx((unit * counted.low, unit * counted.high))
    assert found.difference.value == pytest.approx(0.25 / 40)
    assert found.verdict.startswith("equal within")
    same = compare_rows(RowValues(base, unit="share"), RowValues(base, unit="share"))
    assert same is not None
    assert same.difference.high > 0.05, "forty rows do not show that no row will ever differ"


def test_what_cannot_be_compared_is_left_out() -> None:
    assert compare_rows(RowValues([1.0]), RowValues([2.0])) is None
    assert compare_rows(RowValues([1.0, 2.0]), RowValues([2.0, float("inf")])) is None
    assert compare_rows(RowValues([1.0, 2.0]), RowValues([2.0, 2.5]), groups=["a", "a"]) is None
    assert list(compare_metrics({"a": RowValues([1, 0]), "b": RowValues([1, 0])}, {"a": RowValues([1, 1])})) == ["a"]
    with pytest.raises(ValueError, match="2 and 1 rows"):
        compare_rows(RowValues([1.0, 2.0]), RowValues([2.0]))


def test_pseudo_values_have_the_value_as_their_mean() -> None:
    losses, tokens = np.array([2.0, 9.0, 4.0, 1.0]), np.array([2.0, 3.0, 4.0, 1.0])
    counts = np.stack([losses, tokens], axis=1)
    found = jackknife_values(counts, lambda sums: np.exp(sums[:, 0] / sums[:, 1]))
    assert found.mean() == pytest.approx(np.exp(1.6))
    assert found.argmax() == 1, "the row with the largest loss a token"
    means = jackknife_values(np.stack([losses, np.ones(4)], axis=1), lambda sums: sums[:, 0] / sums[:, 1])
    assert means == pytest.approx(losses), "of a plain mean they are the rows themselves"


@pytest.mark.parametrize(
    "case",
    [
        "yes_no: base 0.6, effect 0.1, correlation 0.2",
        "yes_no, grouped: base 0.6, effect 0, correlation 0.2, likeness 0.2",
        "number: skewed, effect 0.5",
        "number, grouped: normal, effect 0.3, correlation 0.8, likeness 0.2",
    ],
)
def test_intervals_hold_the_truth(case: str) -> None:
    # Of 200 that hold it in 95 of 100 cases, 90% are 3.2 standard deviations away, and 99.5% are 2.9; a method that
    # holds it in 85 of 100, as percentiles do for few groups, has 180 of 200 in one of 40 such tests.
    assert 0.9 <= coverage(case, 40, 200, 1)["coverage"] <= 0.995


def test_grouped_rows_are_compared_by_their_column(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    write = write_rows(tmp_path / "rows.jsonl", rows)
    held_out = write_rows(tmp_path / "held.jsonl", [row | {"who": str(n // 2)} for n, row in enumerate(rows)])
    data = {"validation": held_out, "duplicates": "keep"}
    for group, groups in ((None, None), ("who", len(rows) // 2)):
        made = tiny_run(tiny_model(), write, tmp_path / str(group), data=data, evaluate={"group": group})
        veneer.train(made)
        found = veneer.evaluate(tmp_path / str(group)).as_dict()["comparison"]
        assert {one["rows"]["groups"] for one in found.values()} == {groups}
        assert {one["rows"]["compared"] for one in found.values()} == {len(rows)}
    with pytest.raises(UserError, match=r"evaluate.group = who: \d+ of \d+ held-out rows have no such column"):
        veneer.evaluate(tmp_path / "who", data=write)
