"""Guide 2's comparisons on SmolLM2: ranks, modules, and all weights against an adapter; one line a combination.

    OMP_NUM_THREADS=2 python -m bench.compare     # about 12 minutes on two cores

Runs the sweeps of recipes/compare by `veneer sweep`, but for those whose folder is there, and writes their combinations
to bench/results/compare.json: settings, trained parameters, seconds of the training steps, held-out loss and what it is
above the best one's, with 95% intervals over held-out rows.
"""

import json
import subprocess
import sys
from pathlib import Path

from veneer.machine.environment import environment

HERE = Path(__file__).parent
SWEEPS = ("ranks-by-alpha", "modules", "full")
KEPT = ("settings", "trainable", "steps", "seconds", "loss", "difference")


def main() -> None:
    found = {}
    for name in SWEEPS:
        results = Path("sweeps") / name / "results.json"
        if not results.exists():
            recipe = HERE.parent / "recipes" / "compare" / f"sweep-{name}.yaml"
            more = ["--resume"] if results.parent.exists() else []
            subprocess.run([sys.executable, "-m", "veneer", "sweep", str(recipe), *more], check=True)
        of_sweep = json.loads(results.read_text())
        found[name] = [{key: one[key] for key in KEPT} for one in of_sweep["combinations"]]
    text = json.dumps({"sweeps": found, **environment()}, indent=1)
    (HERE / "results" / "compare.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
