"""The win rate of one set of answers over another: (wins + ties/2) / rows, with a 95% interval and a verdict.

Of each row the second answer wins, loses or ties. Wins less losses is a paired difference of two shares, in which ties
are rows on which both do alike, so it is compared as right and wrong answers are (differences.py): Tango's score
interval, which holds for few rows and where nothing was lost, McNemar's test (here the sign test of wins against
losses), and groups of rows as the independent rows that they are worth. The win rate is (1 + difference) / 2, and so
are the ends of its interval. A binomial interval of the win rate would take ties for coin tosses, and be too wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.config.errors import UserError
from veneer.evaluation.differences import MetricComparison, RowValues, compare_rows
from veneer.evaluation.gate import Bound, Measured, rows_needed
from veneer.evaluation.win_rate.pairs import Pair
from veneer.training.intervals import Interval, proportion

FIRST, SECOND, TIE = "first", "second", "tie"


@dataclass(frozen=True)
class Outcome:
    """A row and which answer won: first, second or tie."""

    pair: Pair
    winner: str


@dataclass(frozen=True)
class WinRate:
    """The win rate of the second answers.

    Attributes:
        wins, ties, losses: rows that the second answer won, tied and lost.
        compared: wins less losses as a paired comparison.
        longer_wins: share of won or lost rows that the longer answer won; None: there is none of unequal length.
    """

    wins: int
    ties: int
    losses: int
    compared: MetricComparison
    longer_wins: Interval | None

    @property
    def rows(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def interval(self) -> Interval:
        """The win rate with its 95% interval."""
        apart = self.compared.difference
        return Interval((1 + apart.value) / 2, (1 + apart.low) / 2, (1 + apart.high) / 2)

    @property
    def detectable(self) -> float:
        """Distance from 50% that so many rows would find in 80 of 100 cases."""
        return self.compared.detectable / 2

    @property
    def verdict(self) -> str:
        """The verdict on the second answers: better, worse, equal within d, or not shown (docs/comparison.md)."""
        found = self.compared.verdict
        return f"equal within {self.compared.equal_within / 2:.3g}" if found.startswith("equal") else found

    @property
    def rows_needed(self) -> int | None:
        """About how many rows like these would show which is better; None: it is shown, or no number would do."""
        if self.verdict in ("better", "worse"):
            return None
        return rows_needed(Bound("win_rate", ">", 0.5, 0), Measured(self.interval, self.rows))

    def as_dict(self) -> dict[str, Any]:
        return {
            "win_rate": self.interval.as_dict(),
            "rows": self.rows,
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "groups": self.compared.groups,
            "verdict": self.verdict,
            "rows_needed": self.rows_needed,
            "probability": self.compared.probability,
            "detectable": self.detectable,
            "p_sign": self.compared.p_mcnemar,
            "method": self.compared.method,
            "longer_wins": self.longer_wins and self.longer_wins.as_dict(),
        }


def win_rate(outcomes: Sequence[Outcome]) -> WinRate:
    """Compute the win rate of the second answers.

    Raises:
        UserError: Fewer than two rows, or groups of rows, were judged.
    """
    first, second = (
        RowValues([float(one.winner == side) for one in outcomes], unit="share") for side in (FIRST, SECOND)
    )
    groups = [one.pair.group or one.pair.place for one in outcomes]
    is_grouped = any(one.pair.group for one in outcomes)
    compared = compare_rows(first, second, groups if is_grouped else None)
    if compared is None:
        what = "rows in one group" if len(outcomes) > 1 else "rows judged"
        raise UserError(f"{len(outcomes)} {what}: a win rate needs two that are independent", "judge more rows")
    wins, losses = len(compared.better_rows), len(compared.worse_rows)
    return WinRate(wins, len(outcomes) - wins - losses, losses, compared, _longer_wins(outcomes))


def _longer_wins(outcomes: Sequence[Outcome]) -> Interval | None:
    """Return how often the longer answer won, of the rows that were not tied and whose answers differ in length."""
    lengths = [(len(one.pair.second) - len(one.pair.first), one.winner) for one in outcomes if one.winner != TIE]
    decided = [(longer > 0) == (winner == SECOND) for longer, winner in lengths if longer]
    return proportion(sum(decided), len(decided)) if decided else None
