"""Measures the demo: wall time, peak memory, every score, the exported file, and the start-up time of the command line.

Each run is a process of its own in a fresh folder. Prints a table and writes bench/results/demo.json.

    .venv/bin/python bench/demo.py --runs 3
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from veneer.machine.device import find_machine
from veneer.machine.environment import environment

RESULTS = Path(__file__).parent / "results"
VENEER = Path(sys.executable).with_name("veneer")


def demo() -> dict[str, Any]:
    """One demo; exit status 0 is part of the claim."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(VENEER), "demo", "--json", "--output-dir", f"{folder}/demo"]
        started = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
    report = json.loads(result.stdout)
    record = report["metrics"]["record"]
    return {
        "process_seconds": round(seconds, 1),
        "wall_seconds": report["wall_seconds"],
        "peak_resident_gib": round(report["peak_resident_bytes"] / 2**30, 2),
        "tokens_per_second": report["tokens_per_second"],
        "load": os.getloadavg()[2],
        "metrics": report["metrics"],
        "exported": report.get("exported"),
        "gguf": {key: value for key, value in report["gguf"].items() if key != "file"},
        "points_over_base_with_examples": round(100 * record["difference_with_examples"]["value"], 1),
    }


def start_up(arguments: list[str], times: int = 10) -> dict[str, float]:
    """Seconds until a command has printed its help."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        subprocess.run([str(VENEER), *arguments], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return {"median": round(statistics.median(seconds), 3), "max": round(max(seconds), 3)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    result: dict[str, Any] = {
        "command": f"bench/demo.py --runs {runs}",
        "machine": find_machine().describe(),
        "kernel": platform.release(),
        "environment": environment(),
        "help_seconds": start_up(["--help"]),
        "train_help_seconds": start_up(["train", "--help"]),
        "demo": [],
    }
    print(f"help {result['help_seconds']}, train --help {result['train_help_seconds']}", flush=True)
    for _ in range(runs):
        result["demo"].append(demo())
        shown = {key: value for key, value in result["demo"][-1].items() if key != "metrics"}
        print(json.dumps(shown), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
