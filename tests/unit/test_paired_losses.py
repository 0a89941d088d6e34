"""Intervals of paired losses cover the truth, and pairs tell apart what the spread of the rows would hide."""

import numpy as np
import pytest

from veneer.training.paired_losses import RowLosses, loss_difference, loss_interval, t_quantile

REPEATS = 1000


def simulated(seed: int, rows: int, seeds: int, spread: float = 0.04) -> tuple[list[RowLosses], list[RowLosses]]:
    """Losses of two adapters whose true difference is 0.05 nats a token, with a difficulty that rows share.

    Args:
        spread: Standard deviation of the difference over seeds.
    """
    rng = np.random.default_rng(seed)
    weights_R = rng.integers(5, 40, rows).astype(float)
    hard_R = rng.normal(2, 0.5, rows)
    own_R = rng.normal(0, 0.1, rows)  # what a row does to the difference, with every seed
    sides: tuple[list[RowLosses], list[RowLosses]] = ([], [])
    for _ in range(seeds):
        luck = rng.normal(0, spread)
        for side, worse_R in zip(sides, (0.05 + luck + own_R, 0 * own_R), strict=True):
            losses_R = (hard_R + worse_R) * weights_R
            side.append(RowLosses(tuple(losses_R.tolist()), tuple(weights_R.tolist())))
    return sides


@pytest.mark.parametrize(("rows", "seeds", "spread"), [(40, 1, 0.0), (40, 5, 0.04), (12, 3, 0.04)])
def test_intervals_cover_the_true_difference(rows: int, seeds: int, spread: float) -> None:
    """95% of 1,000 have a standard error of 0.7 points; three of them, and what few seeds cost, are allowed.

    An interval of one seed is about that seed, so there the seeds are alike.
    """
    covered = 0
    for n in range(REPEATS):
        found = loss_difference(*simulated(n, rows, seeds, spread))
        covered += found.low <= 0.05 <= found.high
    assert 0.925 <= covered / REPEATS <= 0.985


def test_pairs_show_what_two_intervals_would_not() -> None:
    one, other = simulated(0, 40, 5)
    difference = loss_difference(one, other)
    assert difference.low < 0.05 < difference.high
    assert difference.high - difference.low < 0.2
    rows_alone = [loss_interval([side[0]]) for side in (one, other)]
    assert all(found.high - found.low > 0.2 for found in rows_alone)
    assert loss_difference(one, one).as_dict() == {"value": 0, "low": 0, "high": 0}


def test_a_single_row_shows_nothing() -> None:
    single = RowLosses((3.0,), (2.0,))
    assert loss_interval([single]).low == -np.inf
    assert (round(t_quantile(4.9), 3), t_quantile(0.5)) == (2.776, np.inf)
    assert t_quantile(30) == pytest.approx(2.042, abs=2e-3)
