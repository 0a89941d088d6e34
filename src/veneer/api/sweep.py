"""Carries out a sweep over settings of a run, and writes its table, its plot and the runs to take."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from veneer.api.train import finish
from veneer.config import RunFolder, UserError
from veneer.config.folder import write_json, write_text
from veneer.config.load import to_yaml
from veneer.config.names import anchored
from veneer.config.notify import collected, notify_on_error
from veneer.config.sweep import PlannedSweep, load_sweep
from veneer.config.task import require_answers
from veneer.evaluation.sweep import OnRecord, SweepLoop, SweepResult, winning_run
from veneer.evaluation.trial_processes import TrialProcesses
from veneer.evaluation.trials import Measurer, Trials
from veneer.report.sweep_plot import plot_sweep


@dataclass(frozen=True)
class Swept:
    """The report of a sweep.

    Attributes:
        folder: Folder of the sweep.
        result: Results of all combinations.
    """

    folder: Path
    result: SweepResult

    def as_dict(self) -> dict[str, Any]:
        files = {name: str(self.folder / f"{name}.yaml") for name in ("best", "sweet-spot")}
        return self.result.as_dict() | {"sweep_dir": str(self.folder), "runs": files}


def sweep(
    file: str | Path | PlannedSweep,
    resume: bool = False,
    on_record: OnRecord = lambda record: None,
    on_load: Callable[[], None] = lambda: None,
    gpus: int = 1,
) -> Swept:
    """Train each combination of settings of a sweep on one loaded base, and compare them by held-out loss.

    Example:
        swept = veneer.sweep("ranks.yaml")

    Args:
        file: YAML file of the sweep, or what `load_sweep` read from it.
        resume: whether to go on with the sweep that is in its folder.
        on_record: callback that gets each line of trials.jsonl as it is written.
        on_load: callback that is called once base and rows are loaded.
        gpus: trials at a time, each on a GPU of its own, with a base of its own; without GPUs, each in a process. The
            results are the same, and a sweep may be resumed with another number.

    Raises:
        UserError: The sweep, one of its runs or the number of GPUs is not right; nothing was written.
        JobError: No combination could be trained. Interrupted: The user stopped it; it can be resumed.
    """
    devices = _devices(gpus)
    planned = file if isinstance(file, PlannedSweep) else load_sweep(file)
    require_answers(planned.run.model, "veneer sweep")
    folder = planned.sweep.output_dir.expanduser()
    require_sweep_folder(planned, resume)
    with collected(), _measurer(planned, folder, devices) as measurer:
        loop = SweepLoop(planned, folder, measurer, on_record)
        if loop.missing:
            measurer.load()
        on_load()
        with RunFolder(folder).locked():
            require_sweep_folder(planned, resume)
            if not resume:
                write_text(folder / "sweep.yaml", planned.to_yaml())
            result = loop.run()
            _write_results(folder, planned, result)
    return Swept(folder, result)


def _devices(gpus: int) -> list[str]:
    """Return what each of so many processes may see: a GPU that this one sees, or none.

    Raises:
        UserError: that is no number of GPUs, or this process sees fewer.
    """
    if not isinstance(gpus, int) or gpus < 1:
        raise UserError(f"gpus = {gpus}: is no number of GPUs", "give a whole number from 1 on")
    if gpus > 1 and (there := torch.cuda.device_count()) and gpus > there:
        raise UserError(f"gpus = {gpus}: this machine has {there}", f"use {there}, or less")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(gpus)]
    names = list(takewhile(lambda name: name not in ("", "-1"), (name.strip() for name in visible.split(","))))
    if not names:
        return [visible] * gpus
    if gpus > len(names):
        raise UserError(f"gpus = {gpus}: CUDA_VISIBLE_DEVICES lists {len(names)}", f"use {len(names)}, or less")
    return names[:gpus]


@contextmanager
def _measurer(planned: PlannedSweep, folder: Path, devices: list[str]) -> Iterator[Measurer]:
    """Yield what measures trials: this process, or several."""
    if len(devices) == 1:
        yield Trials(planned, folder, finish)
        return
    with TemporaryDirectory() as place:
        file = Path(place) / "sweep.yaml"
        write_text(file, planned.to_yaml())
        command = [sys.executable, "-m", "veneer.api.trial_process", str(file)]
        with TrialProcesses(command, [{"CUDA_VISIBLE_DEVICES": name} for name in devices], folder) as processes:
            yield processes


def require_sweep_folder(planned: PlannedSweep, resume: bool) -> None:
    """Raise UserError where a sweep's folder is not free, or does not hold this sweep to go on with."""
    folder = planned.sweep.output_dir.expanduser()
    file = folder / "sweep.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir = {folder}: is a file", "name a folder in output_dir")
    if not resume:
        if folder.is_dir() and any(entry.name != ".lock" for entry in folder.iterdir()):
            what = "already holds a sweep" if file.exists() else "is not empty"
            fix = "--resume to go on with it, or another output_dir" if file.exists() else "name another output_dir"
            raise UserError(f"output_dir = {folder}: {what}", fix)
        return
    if not file.exists():
        raise UserError(f"output_dir = {folder}: holds no sweep to resume", "start it without --resume")
    before, now = (one.sweep.model_dump(mode="json") for one in (load_sweep(file), planned))
    changed = sorted(key for key in now if key not in ("output_dir", "keep_runs") and before[key] != now[key])
    if changed:
        raise UserError(
            f"output_dir = {folder}: the sweep began with another {', '.join(changed)}",
            "resume it with the settings it began with, or name another output_dir",
        )


def _write_results(folder: Path, planned: PlannedSweep, result: SweepResult) -> None:
    for name, winner in (("best", result.best), ("sweet-spot", result.sweet_spot)):
        run = anchored(winning_run(winner, Path("runs") / f"{folder.name}-{name}"))
        write_text(folder / f"{name}.yaml", to_yaml(run))
    write_json(folder / "results.json", result.as_dict())
    title = f"{folder.name}: {planned.run.model.base}"
    notify_on_error("sweep.png", lambda: plot_sweep(result.as_dict(), folder / "sweep.png", title))
