"""TRL's side of bench/prefer_curve.py, in a Python of its own: loss and margin of each step, written as JSON.

python prefer_trl.py ROWS BASE ADAPTER OUT PAIRS RATE BETA
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


class Recorded(DPOTrainer):
    """Keeps the loss of each step, which the log rounds."""

    losses: list[float]

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        loss = super().compute_loss(*arguments, **named)
        self.losses.append(float(loss))
        return loss


def main() -> None:
    file, base, adapter, out, pairs, rate, beta = sys.argv[1:]
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    settings = DPOConfig(
        output_dir=f"{out}.run",
        per_device_train_batch_size=int(pairs),
        gradient_accumulation_steps=1,
        max_steps=len(rows) // int(pairs),
        learning_rate=float(rate),
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        beta=float(beta),
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    texts = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    trainer = Recorded(model=model, args=settings, train_dataset=texts, processing_class=tokenizer)
    trainer.losses = []
    for read, row in zip(trainer.train_dataset, rows, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert read[name] == row[name], "TRL makes other tokens of this text"
    began = time.process_time()
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    found = {
        "loss": trainer.losses,
        "margin": margins,
        "seconds": time.process_time() - began,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
