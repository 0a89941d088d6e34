"""What an adapter that began otherwise than at zero is worth once it is saved, on a real base.

For each value of adapter.init_lora_weights a short run is trained in float32, and its logits on a text are compared:
live against plain PEFT with the saved adapter, and against it with the adapter rounded to bfloat16, as a share of what
the adapter changes.

    OMP_NUM_THREADS=1 python -m bench.first_values --steps 10 --out bench/results/first_values.json
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import veneer
from veneer.machine.device import find_machine
from veneer.machine.environment import environment
from veneer.model.load import load_model
from veneer.training.job import TrainingJob

KINDS = ("true", "gaussian", "pissa", "olora", "eva", "loftq")
TEXT = "The owl routed each message to the right team, and the hen said what it pleased. " * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rows", default="src/veneer/data/demo/train.jsonl")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found = {kind: measure(kind == "true" or kind, asked.base, asked.rows, asked.steps) for kind in asked.kinds}
    text = json.dumps({"base": asked.base, "steps": asked.steps, "kinds": found, **environment()}, indent=2)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")


def measure(kind: Any, base: str, rows: str, steps: int) -> dict[str, float]:
    """Train, and compare logits: by the largest difference, and by the 2-norm of the rounding and of the change."""
    with tempfile.TemporaryDirectory() as name:
        sections: dict[str, Any] = {
            "model": {"base": base, "dtype": "float32"},
            "adapter": {"init_lora_weights": kind, "r": 8, "lora_alpha": 16},
            "data": {"train": rows, "validation": 0, "limit": 64, "max_length": 256},
            "train": {
                "output_dir": name,
                "max_steps": steps,
                "learning_rate": 1e-4,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": False,
            },
        }
        if kind == "loftq":
            sections["quantization"] = {}
        run = veneer.Run.model_validate(sections)
        job = TrainingJob(run, overwrite=True)
        ids = torch.tensor([job.tokenizer(TEXT)["input_ids"]])
        machine = find_machine()

        def logits(model: Any) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = model.eval()(ids.to(model.device)).logits.cpu()
            return found

        job.fit()
        live = logits(job.model)
        plain = load_model(job.source, run.model, run.quantization, machine)
        before = logits(plain)
        saved = PeftModel.from_pretrained(plain, str(Path(name) / "adapter"))
        again = logits(saved)
        for parameter_name, parameter in saved.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = parameter.data.bfloat16().float()
        change = (live - before).norm()
        return {
            "largest_change": float((live - before).abs().max()),
            "once_saved_share_of_largest_logit": float((again - live).abs().max() / live.abs().max()),
            "rounded_to_16_bits_share_of_change": float((logits(saved) - live).norm() / change),
        }


if __name__ == "__main__":
    main()
