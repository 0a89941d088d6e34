"""Reads the state of a run from its folder alone: nothing heavy is imported.

A run that a process trains holds a lock; one that has delivered its adapter is finished; one whose last event is an
error has failed; any other one was interrupted. All of these but a finished one can be resumed. Numbers are those of
the last records of metrics.jsonl (config/records.py), of which the end alone is read.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from veneer.config.errors import UserError
from veneer.config.files import read_json, read_text
from veneer.config.load import yaml_values
from veneer.config.run_folder import RunFolder
from veneer.config.tail import last_of_kinds, last_record

State = Literal["training", "interrupted", "finished", "failed", "not begun"]


@dataclass(frozen=True)
class RunState:
    """What a run's folder says of it.

    Attributes:
        run_dir: the folder.
        state: training: a process holds its lock; interrupted: it can be resumed; failed: an error ended it; not begun:
            a process ended before the run's settings were written.
        step, steps: last logged step, and the planned number of them; None: not known.
        loss, held_out_loss: last ones logged; None: none was, or it was not finite.
        tokens_per_second: speed of the last logged step.
        best_metric, best_step, best_value: the best evaluation so far, and the metric that it is the best by.
        resumes_from: step of the newest checkpoint; None: there is none.
        last_written: time at which a file of the run was last written, UTC.
        base, task: `model.base` and `model.task`.
        message: error that ended it.
    """

    run_dir: str
    state: State
    step: int
    steps: int | None
    loss: float | None
    held_out_loss: float | None
    tokens_per_second: float | None
    best_metric: str
    best_step: int | None
    best_value: float | None
    resumes_from: int | None
    last_written: str
    base: str
    task: str
    message: str


def run_state(path: Path) -> RunState:
    """Read the state of one run.

    Raises:
        UserError: Its settings are damaged. OSError: Its folder cannot be read.
    """
    folder = RunFolder(path)
    is_held = folder.is_held()  # first: who lets it go has written all else before
    model, metric = _settings(folder)
    last = last_of_kinds(folder.metrics, "train", "eval")
    step, measured = last.get("train", {}), last.get("eval", {})
    event = last_record(folder.events)
    state: State = "interrupted"
    if is_held:
        state = "training"
    elif not folder.run.exists():
        state = "not begun"
    elif folder.is_finished:
        state = "finished"
    elif event.get("level") == "error":
        state = "failed"
    best_step = _number(measured, "best_step")
    return RunState(
        run_dir=str(path),
        state=state,
        step=int(_number(step, "step") or _number(measured, "step") or 0),
        steps=_planned(folder),
        loss=_number(step, "loss"),
        held_out_loss=_number(measured, "loss"),
        tokens_per_second=_number(step, "tokens_per_second"),
        best_metric=metric,
        best_step=None if best_step is None else int(best_step),
        best_value=_number(measured, "best_value"),
        resumes_from=_newest_checkpoint(folder),
        last_written=_last_written(folder),
        base=model.get("base", ""),
        task=model.get("task", ""),
        message=str(event.get("message", "")) if state == "failed" else "",
    )


def _settings(folder: RunFolder) -> tuple[dict[str, str], str]:
    """Return `model.base` and `model.task`, and the metric that the best step is found by.

    Settings are read as they are, not checked: those of another version of Veneer's are listed too.

    Raises:
        UserError: run.yaml is not that of a run.
    """
    if not folder.run.exists():
        return {}, ""
    values = yaml_values(read_text(folder.run), str(folder.run))
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("base"), str):
        raise UserError(f"{folder.run}: not the settings of a run, it names no model.base")
    train = values.get("train")
    stopping = train.get("early_stopping") if isinstance(train, dict) else None
    metric = stopping.get("metric") if isinstance(stopping, dict) else None
    return {"base": model["base"], "task": str(model.get("task", "causal-lm"))}, str(metric or "loss")


def _planned(folder: RunFolder) -> int | None:
    """Return the planned number of steps; None: it is not known."""
    try:
        steps = _number(read_json(folder.plan), "steps")
    except UserError:
        return None
    return None if steps is None else int(steps)


def _newest_checkpoint(folder: RunFolder) -> int | None:
    """Return the step of the newest checkpoint, whole or not; None: there is none."""
    names = [path.name.removeprefix("step-") for path in folder.checkpoints.glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _last_written(folder: RunFolder) -> str:
    files = (folder.environment, folder.run, folder.metrics, folder.events, folder.checkpoints, folder.delivered)
    newest = max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
    return datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds")


def _number(record: dict[str, Any], key: str) -> float | None:
    """Return a number of a record; None: it has none there."""
    value = record.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
