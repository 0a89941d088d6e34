"""Measures `train.learning_rate: auto`: how near it comes to the best rate of its grid, and what finding it costs.

Each rate of the grid trains the same run to its end (`veneer sweep`), and so does `auto`. Compared are held-out losses
after the last step, on the same rows. The target: within 1% of the grid's best, for at most 15% of one run's cost.

    python3 -m bench.rate alpaca.json gsm8k_train.jsonl      # 12 trainings of SmolLM2-135M of 300 steps; best on a GPU

Writes bench/results/rate.json.
"""

import argparse
import json
import time
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

import veneer
from veneer.api.train import finish, load_job
from veneer.config import Run
from veneer.training.rate_search import RATES

RESULTS = Path(__file__).parent / "results" / "rate.json"


def run_on(data: Path, base: str, steps: int) -> dict[str, Any]:
    """The run, as its file holds it, without rate and folder."""
    train = {"max_steps": steps, "per_device_train_batch_size": 8, "warmup_ratio": 0.1, "save_steps": None}
    rows = {"train": str(data.resolve()), "validation": 200, "max_length": 512, "overlong": "drop"}
    return {"model": {"base": base}, "data": rows, "train": train, "adapter": {"r": 16, "lora_alpha": 32}}


def measure(data: Path, base: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train with each rate of the grid, and with the rate that is found."""
    run = run_on(data, base, steps)
    sweep = {"run": run, "output_dir": str(folder / "grid"), "trials": [{"train.learning_rate": r} for r in RATES]}
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep))
    grid = {}
    for combination in veneer.sweep(file).as_dict()["combinations"]:
        loss = combination["loss"]
        grid[combination["settings"]["train.learning_rate"]] = None if loss is None else loss["value"]
    run["train"] |= {"learning_rate": "auto", "output_dir": str(folder / "auto")}
    started = time.perf_counter()
    job = load_job(Run(**run))
    loaded = time.perf_counter()
    trained = finish(job, ())
    search = job.rate_search
    assert search is not None
    loss = min(loss for loss in grid.values() if loss is not None)
    return {
        "rows": data.name,
        "steps": steps,
        "grid": {f"{rate:g}": loss for rate, loss in grid.items()},
        "found": search.as_dict(),
        "excess_over_best": round(grid[search.rate] / loss - 1, 5),
        "share_of_cost": search.share_of_run,
        "loading_and_search_seconds": round(loaded - started, 1),
        "training_seconds": round(time.perf_counter() - loaded, 1),
        "final_loss": trained.as_dict()["final_loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, help="files of rows")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    names = ("torch", "transformers", "peft")
    result: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {name: metadata.version(name) for name in names},
        "date": time.strftime("%Y-%m-%d"),
        "runs": [],
    }
    for data in a.data:
        with TemporaryDirectory() as folder:
            result["runs"].append(measure(data, a.base, a.steps, Path(folder)))
        print(json.dumps(result["runs"][-1]), flush=True)
        a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
