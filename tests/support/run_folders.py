"""Folders of runs as commands leave them, written by hand: no model is trained for them."""

import json
from pathlib import Path
from typing import Any


def train_record(step: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    """A line of a logged step."""
    return {
        **{"kind": "train", "step": step, "epoch": step / 10, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0},
        **{"tokens": 100, "trained_tokens": 50, "seconds": 0.5, "tokens_per_second": 200.0, "peak_bytes": 2**30},
        **{"predicted_peak_bytes": 2**30},
        **more,
    }


def eval_record(step: int, loss: float | None = 1.5, **more: Any) -> dict[str, Any]:
    """A line of an evaluation."""
    found = {"kind": "eval", "step": step, "loss": loss, "trained_tokens": 9, "best_step": step, "best_value": loss}
    return found | more


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def make_run(folder: Path, records: list[dict[str, Any]] | None = None, is_finished: bool = False) -> Path:
    """Write a run of 10 planned steps; `records`: its metrics, which may not be there yet."""
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps({"libraries": {"veneer": "0"}}))
    (folder / "plan.json").write_text(json.dumps({"steps": 10, "step_seconds": {"likely": 0.5}}))
    (folder / "run.yaml").write_text("model: {base: org/base, task: causal-lm}\ntrain: {early_stopping: null}\n")
    if records is not None:
        write_lines(folder / "metrics.jsonl", records)
    if is_finished:
        (folder / "adapter").mkdir()
    return folder
