"""Compares variants of LoRA as PEFT's benchmark on MetaMathQA does, but over five seeds and row by row.

PEFT's `method_comparison` trains each variant once and lists their scores, so that a difference of a point may be the
seed's. Here rank 8, rank 32, rank 64 with rank-stabilized scaling and rank 32 on attention alone are trained from five
seeds each by `veneer sweep`, on rows of gsm8k, and compared by the loss of the same held-out rows.

    python3 -m bench.metamath gsm8k_train.jsonl    # 20 trainings of SmolLM2-135M: a quarter of an hour on 2 cores

Writes bench/results/metamath.json and metamath.png.
"""

import argparse
import json
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

import veneer

RESULTS = Path(__file__).parent / "results"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VARIANTS = [
    {"adapter.r": 8, "adapter.lora_alpha": 16},
    {"adapter.r": 32, "adapter.lora_alpha": 64},
    {"adapter.r": 64, "adapter.lora_alpha": 64, "adapter.use_rslora": True},
    {"adapter.r": 32, "adapter.lora_alpha": 64, "adapter.target_modules": ATTENTION},
]


def sweep_of(data: Path, steps: int, seeds: int, folder: Path) -> dict[str, object]:
    """The sweep, as its file holds it."""
    run = {
        "model": {"base": "smollm2-135m-instruct"},
        "data": {"train": str(data.resolve()), "validation": 48, "max_length": 256},
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "warmup_ratio": 0.1,
            "max_steps": steps,
            "eval_steps": None,
            "gradient_checkpointing": False,
        },
    }
    return {"run": run, "output_dir": str(folder), "trials": VARIANTS, "seeds": seeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="rows of gsm8k")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    a = parser.parse_args()
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / "metamath.yaml"
        file.write_text(yaml.safe_dump(sweep_of(a.data, a.steps, a.seeds, Path(temporary) / "sweep")))
        started = time.perf_counter()
        swept = veneer.sweep(file, on_record=lambda record: print(json.dumps(record)[:160], flush=True))
        seconds = time.perf_counter() - started
        shutil.copy(swept.folder / "sweep.png", RESULTS / "metamath.png")
        found = {name: value for name, value in swept.as_dict().items() if name not in ("sweep_dir", "runs")}
    names = ("torch", "transformers", "peft")
    found |= {
        "steps": a.steps,
        "seeds": a.seeds,
        "seconds": round(seconds, 1),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in names},
        "date": time.strftime("%Y-%m-%d"),
    }
    (RESULTS / "metamath.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
