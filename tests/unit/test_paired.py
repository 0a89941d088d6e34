"""Paired comparison of two models: known values, verdicts, and how many rows would decide."""

import pytest

from veneer.evaluation.paired import MOST_ROWS, difference, mcnemar, paired


def outcomes(right: int, gained: int, lost: int, rows: int) -> tuple[list[bool], list[bool]]:
    """Rows of two models: right by the first, and right by the second after so many turned."""
    before = [True] * right + [False] * (rows - right)
    after = [False] * lost + [True] * (right - lost + gained) + [False] * (rows - right - gained)
    return before, after


def test_the_interval_is_tangos() -> None:
    z = 1.959964**2
    none = difference(40, 0, 0)  # nothing turned: the test's variance is n d (1 - d), so d = z / (n + z)
    assert (none.value, none.low, none.high) == pytest.approx((0, -z / (40 + z), z / (40 + z)), abs=1e-9)
    all_right = difference(40, 40, 0)  # its variance is n (1 - d d) then, so d = (n - z) / (n + z)
    assert (all_right.value, all_right.low, all_right.high) == pytest.approx((1, (40 - z) / (40 + z), 1), abs=1e-9)
    # At a difference of zero it is McNemar's test: an end is zero where (gained - lost)^2 = z (gained + lost).
    lost = 10.0
    gained = lost + z / 2 + (2 * z * lost + z * z / 4) ** 0.5
    assert difference(100, gained, lost).low == pytest.approx(0, abs=1e-9)
    one, other = difference(50, 12, 2), difference(50, 2, 12)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low)), "it is the same the other way round"


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1), (1, 0, 1), (5, 0, 2 / 32), (0, 6, 2 / 64), (8, 2, 2 * (1 + 10 + 45) / 1024), (7, 7, 1)],
)
def test_mcnemar_is_exact(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == p


def test_mcnemar_goes_on_as_normal_where_many_turned() -> None:
    assert mcnemar(530, 470) == pytest.approx(mcnemar(531, 470), rel=0.1)
    assert mcnemar(5000, 5000) == 1


@pytest.mark.parametrize(
    ("right", "gained", "lost", "rows", "verdict"),
    [
        (83, 0, 0, 120, "same"),
        (83, 3, 3, 120, "same"),
        (83, 9, 20, 120, "worse"),
        (83, 20, 4, 120, "better"),
        (83, 3, 0, 120, "same"),
        (0, 83, 0, 120, "better"),
        (30, 0, 0, 40, "not shown with 40 rows"),
        (83, 2, 4, 120, "not shown with 120 rows"),
    ],
)
def test_verdicts(right: int, gained: int, lost: int, rows: int, verdict: str) -> None:
    found = paired(*outcomes(right, gained, lost, rows))
    assert (found.gained, found.lost) == (gained, lost)
    assert found.verdict.startswith(verdict)


def test_the_rows_it_names_decide_it() -> None:
    few = paired(*outcomes(30, 0, 0, 40))
    assert not few.verdict.startswith("same")
    n = few.rows_needed
    assert 40 < n < 120
    assert paired(*outcomes(round(0.75 * n), 0, 0, n)).verdict == "same"
    unclear = paired(*outcomes(50, 10, 5, 100))
    assert 100 < unclear.rows_needed < MOST_ROWS


def test_rows_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="2 and 1 rows"):
        paired([True, False], [True])
    with pytest.raises(ValueError, match="0 and 0 rows"):
        paired([], [])
