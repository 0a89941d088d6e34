"""How often the intervals of a comparison cover the truth: simulated comparisons whose true difference is known.

    python -m bench.judge --coverage

Each case is drawn 2,000 times and given to the function that `veneer evaluate` calls. Of 2,000 intervals that cover in
95 of 100 cases, 94 to 96% do as a rule. Writes bench/results/judge.json: the share of each case, and the speed of the
largest comparison. Cases:

yes_no      right or wrong under both models; correlated as hard rows make them
number      a score under both models: differences that are normal, skewed, or zero on most rows
grouped     both of these, rows in groups of unequal size that are partly alike
few_change  hardly any row turns: an interval cannot but cover too often, which is reported apart
"""

import argparse
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import veneer
from veneer.config.folder import write_json
from veneer.evaluation.differences import RowValues, compare_rows

RESULT = Path(__file__).parent / "results" / "judge.json"
SIMULATIONS = 2000
SIZES = (40, 100, 400)
GROUPS = {40: 20, 100: 25, 400: 50}
Draw = Callable[[Any, int], tuple[Any, Any]]  # generator and rows to values of base and tuned


def yes_no(base: float, effect: float, correlation: float) -> Draw:
    """Rows right or wrong, with so much of a base and so large a correlation between both models."""
    tuned = base + effect
    both = base * tuned + correlation * math.sqrt(base * (1 - base) * tuned * (1 - tuned))
    chances = [both, base - both, tuned - both, 1 - base - tuned + both]
    assert min(chances) >= 0, f"no such table: {chances}"

    def draw(rng: Any, rows: int) -> tuple[Any, Any]:
        cell = rng.choice(4, size=rows, p=chances)
        return (cell < 2).astype(float), np.isin(cell, (0, 2)).astype(float)

    return draw


def normal(effect: float, correlation: float) -> Draw:
    """Normal scores."""

    def draw(rng: Any, rows: int) -> tuple[Any, Any]:
        shared = math.sqrt(correlation) * rng.normal(size=rows)
        one, other = math.sqrt(1 - correlation) * rng.normal(size=(2, rows))
        return shared + one, shared + other + effect

    return draw


def skewed(effect: float) -> Draw:
    """Gains of which few are large: exponential."""

    def draw(rng: Any, rows: int) -> tuple[Any, Any]:
        base = rng.normal(size=rows)
        return base, base + rng.exponential(size=rows) - 1 + effect

    return draw


def sparse(changed: float) -> Draw:
    """Scores between 0 and 1 that are the same on most rows; where not, tuned is 0.2 better on average."""

    def draw(rng: Any, rows: int) -> tuple[Any, Any]:
        base = rng.uniform(0, 0.6, size=rows)
        return base, np.where(rng.random(rows) < changed, rng.uniform(size=rows), base)

    return draw


def cases() -> dict[str, tuple[float, Draw, float | None]]:
    """Return the true difference, the draw and the likeness within groups (None: no groups) of each case."""
    found: dict[str, tuple[float, Draw, float | None]] = {}
    for effect in (0, 0.05, 0.1, 0.2):
        for correlation in (0.2, 0.6):
            name = f"base 0.6, effect {effect}, correlation {correlation}"
            draw = yes_no(0.6, effect, correlation)
            found[f"yes_no: {name}"] = effect, draw, None
            if effect in (0, 0.1):
                for likeness in (0, 0.2):
                    found[f"yes_no, grouped: {name}, likeness {likeness}"] = effect, draw, likeness
    numbers = {
        "normal, effect 0, correlation 0.3": (0, normal(0, 0.3)),
        "normal, effect 0.3, correlation 0.8": (0.3, normal(0.3, 0.8)),
        "skewed, effect 0": (0, skewed(0)),
        "skewed, effect 0.5": (0.5, skewed(0.5)),
        "30% of rows differ": (0.06, sparse(0.3)),
        "15% of rows differ": (0.03, sparse(0.15)),
    }
    for name, (effect, draw) in numbers.items():
        found[f"number: {name}"] = effect, draw, None
        if name.startswith("normal") or name.startswith("30%"):
            for likeness in (0, 0.2):
                found[f"number, grouped: {name}, likeness {likeness}"] = effect, draw, likeness
    found["few_change: yes_no, base 0.6, effect 0, correlation 0.95"] = 0, yes_no(0.6, 0, 0.95), None
    found["few_change: number, 5% of rows differ"] = 0.01, sparse(0.05), None
    return found


def coverage(name: str, rows: int, simulations: int, seed: int) -> dict[str, Any]:
    """Simulate one case; gives the share of intervals that cover the truth, and how often each verdict came."""
    truth, draw, likeness = cases()[name]
    rng = np.random.default_rng([rows, sum(name.encode()), seed])
    verdicts: dict[str, int] = {}
    covered = 0
    for _ in range(simulations):
        base, tuned = draw(rng, rows)
        groups = None
        if likeness is not None:
            weights = 0.2 + rng.exponential(size=GROUPS[rows])
            rest = rng.choice(GROUPS[rows], size=rows - GROUPS[rows], p=weights / weights.sum())
            groups = np.concatenate([np.arange(GROUPS[rows]), rest])
            copies = rng.random(rows) < math.sqrt(likeness)  # these are what their group is
            base, tuned = (
                np.where(copies, of_groups[groups], own)
                for own, of_groups in zip((base, tuned), draw(rng, GROUPS[rows]), strict=True)
            )
        found = compare_rows(RowValues(base), RowValues(tuned), groups)
        assert found is not None
        covered += found.difference.low - 1e-12 <= truth <= found.difference.high + 1e-12
        verdict = found.verdict.split(" within")[0]
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
    return {
        "case": name,
        "rows": rows,
        "groups": None if likeness is None else GROUPS[rows],
        "truth": truth,
        "coverage": covered / simulations,
        "verdicts": {verdict: count / simulations for verdict, count in sorted(verdicts.items())},
    }


def seconds_of_largest() -> float:
    """Time the comparison of 10,000 rows by 2,000 resamples."""
    rng = np.random.default_rng(0)
    base, tuned = rng.normal(size=(2, 10_000))
    started = time.perf_counter()
    compare_rows(RowValues(base), RowValues(tuned))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coverage", action="store_true", required=True)
    parser.add_argument("--simulations", type=int, default=SIMULATIONS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="of the draws; no rule was chosen by those of 1")
    parser.add_argument("--out", type=Path, default=RESULT)
    a = parser.parse_args()
    jobs = [(name, rows) for rows in SIZES for name in cases()]
    started = time.perf_counter()
    with ProcessPoolExecutor(a.processes) as pool:
        found = list(pool.map(coverage, *zip(*jobs, strict=True), [a.simulations] * len(jobs), [a.seed] * len(jobs)))
    judged = [one for one in found if not one["case"].startswith("few_change")]
    shares = [one["coverage"] for one in judged]
    write_json(
        a.out,
        {
            "command": f"python -m bench.judge --coverage --seed {a.seed}",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]},
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "veneer": veneer.__version__,
            },
            "simulations": a.simulations,
            "seconds": round(time.perf_counter() - started, 1),
            "seconds_10000_rows_2000_resamples": round(seconds_of_largest(), 3),
            "cases": len(judged),
            "lowest_coverage": min(shares),
            "mean_coverage": round(float(np.mean(shares)), 4),
            "highest_coverage": max(shares),
            "outside_93_to_97": [one for one in judged if not 0.93 <= one["coverage"] <= 0.97],
            "found": found,
        },
    )
    for one in sorted(found, key=lambda one: one["coverage"]):
        print(f"{one['coverage']:.4f}  {one['rows']:>4} rows  {one['case']}  {one['verdicts']}")


if __name__ == "__main__":
    main()
