"""How often the interval of a win rate covers the truth: simulated judgments whose true win rate is known.

    python -m bench.win_rate

Each case is drawn 2,000 times and given to the function that `veneer judge` calls: shares of rows that are won, tied
and lost, with 40, 100 and 400 rows, alone and in groups of unequal size that are partly alike. Beside it, for rows that
stand alone: Wilson's interval of wins and half the ties, as if a win rate were a share of rows. Writes
bench/results/win_rate.json.
"""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

import veneer
from veneer.config.folder import write_json
from veneer.evaluation.win_rate.pairs import Pair
from veneer.evaluation.win_rate.win_rate import FIRST, SECOND, TIE, Outcome, win_rate
from veneer.training.intervals import proportion

RESULT = Path(__file__).parent / "results" / "win_rate.json"
SIMULATIONS = 2000
GROUPS = {40: 20, 100: 25, 400: 50}
ALIKE = 0.3  # share of rows whose outcome is that of their group
SHARES = [(0.5, 0, 0.5), (0.4, 0.2, 0.4), (0.45, 0.2, 0.35), (0.6, 0.2, 0.2), (0.15, 0.7, 0.15), (0.25, 0.7, 0.05)]
WINNERS = (SECOND, TIE, FIRST)


def draw(rng: Any, shares: tuple[float, ...], rows: int, groups: int | None) -> list[Outcome]:
    """Draw the outcomes of rows; in groups, some take that of their group."""
    drawn = rng.choice(3, size=rows, p=shares)
    names: list[str | None] = [None] * rows
    if groups is not None:
        of_row = np.sort(rng.choice(groups, size=rows, p=rng.dirichlet(np.full(groups, 5.0))))
        of_group = rng.choice(3, size=groups, p=shares)
        drawn = np.where(rng.random(rows) < ALIKE, of_group[of_row], drawn)
        names = [str(group) for group in of_row]
    return [Outcome(Pair(str(n), "", "a", "b", group=names[n]), WINNERS[one]) for n, one in enumerate(drawn)]


def coverage(shares: tuple[float, ...], rows: int, groups: int | None, simulations: int) -> dict[str, Any]:
    """Return how often the intervals of one case hold the truth, and how often a verdict is wrong."""
    rng, truth = np.random.default_rng(rows), shares[0] + shares[1] / 2
    held = wilson = wrong = 0
    widths = []
    for _ in range(simulations):
        found = win_rate(draw(rng, shares, rows, groups))
        interval = found.interval
        held += interval.low <= truth <= interval.high
        widths.append(interval.high - interval.low)
        wrong += {"better": truth <= 0.5, "worse": truth >= 0.5}.get(found.verdict, False)
        half = proportion(round(found.wins + found.ties / 2), rows)
        wilson += half.low <= truth <= half.high
    return {
        "won_tied_lost": shares,
        "rows": rows,
        "groups": groups,
        "coverage": held / simulations,
        "width": round(float(np.mean(widths)), 4),
        "wrong_better_or_worse": wrong / simulations,
        "coverage_of_wilson": None if groups else wilson / simulations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=SIMULATIONS)
    parser.add_argument("--out", type=Path, default=RESULT)
    a = parser.parse_args()
    found = [
        coverage(shares, rows, groups, a.simulations)
        for shares in SHARES
        for rows in GROUPS
        for groups in (None, GROUPS[rows])
    ]
    shares = [one["coverage"] for one in found]
    alone = [one["coverage_of_wilson"] for one in found if one["groups"] is None]
    write_json(
        a.out,
        {
            "command": "python -m bench.win_rate",
            "date": time.strftime("%Y-%m-%d"),
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "veneer": veneer.__version__,
            },
            "simulations": a.simulations,
            "cases": len(found),
            "lowest_coverage": min(shares),
            "mean_coverage": round(float(np.mean(shares)), 4),
            "highest_coverage": max(shares),
            "wilson_lowest_and_highest": [min(alone), max(alone)],
            "found": found,
        },
    )
    for one in found:
        print(one)


if __name__ == "__main__":
    main()
