"""What tiny runs of every covered family come to, by engine: the numbers that no refactoring may move.

Each run trains six steps through the Python API. Its losses and gradient norms hold on any machine, but for rounding;
the adapter's SHA-256 holds where the file was written: the same CPU, the same torch. After a change that is meant to
move numbers, write the file anew with

    OMP_NUM_THREADS=1 python -m tests.support.pinned
"""

import hashlib
import json
import platform
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import FAMILIES, save_tiny_model

FILE = Path(__file__).with_name("pinned.json")
FUSED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")
STEPS = 6
# Family, engine, packing, dropout: Llama has every combination, the others every pair of two.
CASES = [
    *product(("llama",), ("reference", "fused"), (False, True), (0.0, 0.1)),
    *(
        (family, engine, packing, dropout)
        for family in FUSED[1:]
        for engine, packing, dropout in (
            *(("reference", False, 0.0), ("reference", True, 0.1)),
            *(("fused", False, 0.1), ("fused", True, 0.0)),
        )
    ),
    *(
        (family, "reference", packing, dropout)
        for family in ("gpt2", "opt")
        for packing, dropout in ((False, 0.0), (True, 0.1))
    ),
]


def name_of(family: str, engine: str, packing: bool, dropout: float) -> str:
    return f"{family} {engine} {'packed' if packing else 'rows'} {'dropout' if dropout else 'plain'}"


@cache
def machine() -> str:
    """What the last bit of a float32 sum depends on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {cpu.partition(':')[2].strip()} {capability}, torch {torch.__version__}, 1 thread"


def rows(file: Path) -> None:
    """24 rows of unlike lengths."""
    animals = ("cat", "dog", "owl", "hen")
    with file.open("w") as out:
        for n in range(24):
            asked = f"what does the {animals[n % 4]} say " + "please " * (n % 5)
            answer = f"the {animals[(n + 1) % 4]} and the {animals[n % 3]} " * (1 + n % 3)
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{answer}{n}"}]
            out.write(json.dumps({"messages": messages}) + "\n")


def measure(family: str, engine: str, packing: bool, dropout: float, folder: Path) -> dict[str, Any]:
    """Train in a folder that holds nothing yet; losses, gradient norms and the adapter's SHA-256."""
    from veneer.api.train import load_job
    from veneer.config import Run

    save_tiny_model(FAMILIES[family], folder / "base")
    rows(folder / "rows.jsonl")
    run = Run.model_validate(
        {
            "model": {"base": str(folder / "base"), "dtype": "float32"},
            "quantization": None,
            "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": dropout},
            "data": {"train": str(folder / "rows.jsonl"), "validation": 0, "packing": packing, "max_length": 128},
            "train": {
                "engine": engine,
                "output_dir": str(folder / "run"),
                "max_steps": STEPS,
                "per_device_train_batch_size": 1 if packing else 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "seed": 1,
            },
        }
    )
    load_job(run).fit()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    weights = (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    return {
        "losses": [step["loss"] for step in steps],
        "gradient_norms": [step["grad_norm"] for step in steps],
        "adapter_sha256": hashlib.sha256(weights).hexdigest(),
    }


def main() -> None:
    """Measure every case and write the file."""
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[name_of(*case)] = measure(*case, Path(folder))
            print(name_of(*case), found[name_of(*case)]["losses"][-1], flush=True)
    FILE.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
