"""What ships of the demo's run, scored: is it the model that was judged?

The demo's run is trained and evaluated (or taken from a folder), then merged on both bases and exported in three types,
each certified by the product's own commands on all held-out rows. For each artifact: its score, how many rows turned
right and wrong against the judged answers, answers in the same words, the verdict, and its size. Writes
bench/results/shipped.json.

    .venv/bin/python bench/shipped.py --run runs/demo
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from veneer.machine.device import find_machine
from veneer.machine.environment import environment

RESULTS = Path(__file__).parent / "results"
VENEER = Path(sys.executable).with_name("veneer")
# Name: command and options.
ARTIFACTS: dict[str, list[str]] = {
    "merged": ["merge"],
    "merged, 16-bit base": ["merge", "--on", "base"],
    "f16": ["export", "--quant", "f16"],
    "q8_0": ["export", "--quant", "q8_0"],
    "q4_k_m, importance matrix": ["export", "--quant", "q4_k_m"],
    "q4_k_m": ["export", "--quant", "q4_k_m", "--no-imatrix"],
    "q4_k_m, 16-bit base, importance matrix": ["export", "--quant", "q4_k_m", "--on", "base"],
    "q4_k_m, 16-bit base": ["export", "--quant", "q4_k_m", "--on", "base", "--no-imatrix"],
}


def ship(run: Path, name: str, folder: Path) -> dict[str, Any]:
    """Make one artifact and read its certificate."""
    command, *options = ARTIFACTS[name]
    arguments = [str(VENEER), command, str(run), "--out", str(folder / "out"), *options, "--json"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(arguments)}\n{result.stderr}")
    report = json.loads(result.stdout)
    certificate, checks = report["certificate"], {}
    for check in certificate["checks"]:
        checks[check["id"]] = {key: check[key] for key in ("passed", "value", "limit", "detail")}
    score = certificate["score"]
    return {
        "on": report["on"],
        "megabytes": round(report["bytes"] / 1e6, 1),
        "certified": certificate["passed"],
        "first_difference": certificate["first_difference"],
        "score": score,
        "checks": {key: checks[key] for key in ("distributions", "agreement", "stops") if key in checks},
        "noise": certificate["noise"],
        "seconds": certificate["seconds"],
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, help="The demo's run, evaluated; without it, it is made.")
    parser.add_argument("--only", nargs="+", choices=ARTIFACTS, help="These alone; the others' results stay.")
    given = parser.parse_args()
    run, names = given.run, given.only or list(ARTIFACTS)
    result: dict[str, Any] = {
        "command": "bench/shipped.py",
        "machine": find_machine().describe(),
        "environment": environment(),
        "artifacts": json.loads((RESULTS / "shipped.json").read_text())["artifacts"] if given.only else {},
    }
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            run = Path(folder) / "demo"
            subprocess.run([str(VENEER), "demo", "--output-dir", str(run)], check=True)
        for number, name in enumerate(names):
            place = Path(folder) / str(number)
            place.mkdir()
            found = result["artifacts"][name] = ship(run, name, place)
            score, outcome = found["score"], "certified" if found["certified"] else found["first_difference"]
            print(
                f"{name:40s} {score['artifact']['value']:6.1%} (judged {score['judged']['value']:.1%}), "
                f"+{score['wrong_to_right']} -{score['right_to_wrong']}, same words {score['same_answers']} of "
                f"{score['rows']}: {score['verdict']}; {outcome}",
                flush=True,
            )
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / "shipped.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
