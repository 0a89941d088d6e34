"""Measures the recipe of classification: accuracy beside the majority label's, time, and peak against the plan.

    python3 -m bench.routing    # a minute or two on 2 cores; needs no data

Writes bench/results/routing.json. Targets: better than the majority by 30 points in 180 seconds, and a peak within 8%
of the planned one.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import veneer
from veneer.config import load_run
from veneer.machine.device import find_machine
from veneer.machine.environment import environment
from veneer.training.metrics import read_metrics

RESULT = Path(__file__).parent / "results" / "routing.json"
RECIPE = Path(__file__).parents[1] / "recipes" / "minilm-routing.yaml"


def main() -> None:
    with TemporaryDirectory() as folder:
        run = load_run(RECIPE, [f"train.output_dir={folder}/run"])
        started, used = time.perf_counter(), time.process_time()
        trained = veneer.train(run)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
        accuracy = veneer.evaluate_classifier(Path(folder) / "run").judged.metrics["accuracy"]
        records = [line for line in read_metrics(Path(folder) / "run" / "metrics.jsonl") if line["kind"] == "train"]
    planned = records[-1]["predicted_peak_bytes"]
    result = {
        "machine": find_machine().describe(),
        "environment": environment(),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "accuracy": accuracy,
        "planned_peak_bytes": planned,
        "peak_bytes": trained.peak_bytes,
        "plan_error": round(planned / trained.peak_bytes - 1, 4),
        "trained": asdict(trained) | {"run_dir": ""},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
