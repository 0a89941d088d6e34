"""How soon a wrong name, a wrong option and a call for help are answered: each ten times, in processes of their own.

    python -m bench.startup

Writes bench/results/startup.json: for each call its exit status, and seconds from start to end (median and largest).
"""

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

import veneer
from veneer.config.folder import write_json

RESULT = Path(__file__).parent / "results" / "startup.json"
REPEATS = 10
CALLS = (
    "--help",
    "--version",
    "train --help",
    "train missing.yaml",
    "train run.yaml data.train=missing.jsonl",
    "train run.yaml model.base=./missing",
    "verify missing.yaml",
    "plan missing.yaml",
    "plan run.yaml --gpu unheard-of",
    "data missing.jsonl --model smollm2-135m-instruct",
    "init missing.jsonl --out new.yaml",
    "evaluate nowhere",
    "generate nowhere -p x",
    "generate smollm2-135m-instruct -p x --top-p 3",
    "merge nowhere --out x",
    "merge nowhere --out x --dtype int4",
    "export nowhere --out x --quant q9",
    "certify x --against nowhere",
)


def main() -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        Path(folder, "run.yaml").write_text("model: {base: smollm2-135m-instruct}\ndata: {train: rows.jsonl}\n")
        for call in CALLS:
            seconds, status = [], 0
            for _ in range(REPEATS):
                started = time.perf_counter()
                status = run(call, folder)
                seconds.append(time.perf_counter() - started)
            results[call] = {
                "status": status,
                "median_seconds": round(statistics.median(seconds), 3),
                "largest_seconds": round(max(seconds), 3),
            }
            print(f"{results[call]['median_seconds']:.3f} s ({results[call]['largest_seconds']:.3f})  veneer {call}")
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    versions = {"python": platform.python_version(), "veneer": veneer.__version__}
    write_json(
        RESULT,
        {"command": "python -m bench.startup", "hardware": hardware, "versions": versions, "repeats": REPEATS}
        | {"calls": results},
    )


def run(call: str, folder: str) -> int:
    """Call the command line in a process of its own; gives its exit status."""
    given = [sys.executable, "-m", "veneer", *call.split()]
    return subprocess.run(given, capture_output=True, cwd=folder, check=False).returncode


if __name__ == "__main__":
    main()
    print(json.dumps({"wrote": str(RESULT)}))
