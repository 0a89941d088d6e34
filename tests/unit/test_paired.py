"""Paired comparison of two models: known values, verdicts, and how many rows would decide."""

import pytest

from veneer.evaluation.paired import MOST_ROWS, difference, paired


def outcomes(right: int, gained: int, lost: int, rows: int) -> tuple[list[bool], list[bool]]:
    """Rows of two models: right by the first, and right by the second after so many turned."""
    before = [True] * right + [False] * (rows - right)
    after = [False] * lost + [True] * (right - lost + gained) + [False] * (rows - right - gained)
    return before, after


def test_the_interval_is_newcombes() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635, table II, method 10: both 36, one alone 12, the other 2 of 50.
    found = difference(50, 48, 2, 12)
    assert (found.value, -found.high, -found.low) == pytest.approx((-0.2, 0.0569, 0.3404), abs=1e-4)
    back = difference(50, 38, 12, 2)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low)), "it is the same the other way round"


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
