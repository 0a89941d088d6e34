"""Short training runs on tiny models, for the tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import veneer
from veneer.config import Interrupted, RunFolder
from veneer.data.pipeline import HeldOut
from veneer.evaluation.compare import Scorer
from veneer.evaluation.responder import ModelResponder
from veneer.training.job import TrainingJob
from veneer.training.metrics import read_metrics


def some_rows() -> list[dict[str, Any]]:
    """Sixteen rows of uneven length whose answers follow from their questions; one holds an address."""
    animals = ["cat", "dog", "owl", "hen"]
    return [
        {
            "prompt": f"what does the {animals[n % 4]} say" + " please" * (n % 5) + (" a@b.org" if n == 3 else ""),
            "completion": animals[n % 4] * (1 + n % 3),
        }
        for n in range(16)
    ]


def some_pairs(count: int = 8) -> list[dict[str, Any]]:
    """Pairs of uneven length; no answer is only chosen or only rejected."""
    animals = ["cat", "dog", "owl", "hen"]
    return [
        {
            "prompt": f"what does the {animals[n % 4]} say" + " please" * (n % 5),
            "chosen": animals[n % 4] * (1 + n % 3),
            "rejected": animals[(n + 1) % 4] * (1 + n % 2),
        }
        for n in range(count)
    ]


def some_rated(count: int = 8) -> list[dict[str, Any]]:
    """Rows of uneven length, half of them rated good."""
    rows = []
    for pair in some_pairs(-(-count // 2)):
        for name in ("chosen", "rejected"):
            rows.append({"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"})
    return rows[:count]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tiny_run(base: Path, rows_file: str, output_dir: Path, **sections: dict[str, Any] | None) -> veneer.Run:
    """A run of six steps on a tiny model in float32; `sections` override its settings."""
    settings: dict[str, Any] = {
        "model": {"base": str(base), "dtype": "float32"},
        "adapter": {"r": 4, "lora_alpha": 8},
        "data": {"train": rows_file, "validation": 0, "max_length": 128},
        "train": {
            "output_dir": output_dir,
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
        },
        "evaluate": {"max_new_tokens": 4},
    }
    for name, section in sections.items():
        settings[name] = section if section is None else settings.get(name, {}) | section
    return veneer.Run.model_validate(settings)


def scorer(job: TrainingJob, held_out: Sequence[HeldOut]) -> Scorer:
    """What scores a job's model on rows, by its settings."""
    responder = ModelResponder(job.model, job.engine, job.renderer, job.run.evaluate.batch_size)
    return Scorer(responder, held_out, job.run.evaluate)


def losses(folder: Path, kind: str = "train") -> list[float]:
    """The losses in a run's metrics.jsonl."""
    return [record["loss"] for record in read_metrics(RunFolder(folder).metrics) if record["kind"] == kind]


class StopAt:
    """A listener that interrupts once a step is done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            raise Interrupted(Path())
