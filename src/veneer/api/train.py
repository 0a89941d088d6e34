"""Training a run, and what is written beside its adapter."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.api.warned import or_warn
from veneer.config import Run
from veneer.release import write_card, write_passport
from veneer.report import plot_loss
from veneer.training import Listener, Resume, Trained, TrainingJob, finished
from veneer.training.metrics import read_metrics

Hook = Listener | Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RecordListener:
    """A listener that calls a function with each record."""

    on_record: Callable[[dict[str, Any]], None]

    def on_start(self, steps: int, done: int) -> None:
        pass

    def on_end(self) -> None:
        pass


def train(
    run: Run,
    resume: Resume = False,
    listeners: Sequence[Hook] = (),
    force: bool = False,
    overwrite: bool = False,
) -> Trained:
    """Carry out a run: load, train, write the adapter with its card and the picture of its loss.

    Example:
        trained = veneer.train(run, listeners=[listen])
        print(trained.run_dir, trained.final_loss)

    Args:
        run: settings of the run.
        resume: whether to go on from the run's last checkpoint. "auto": begin where there is no run yet, go on where
            there is one, and give the report of one that is finished.
        listeners: functions that are called with each record of metrics.jsonl: a logged step or an evaluation.
        force: whether to start a run that is foreseen not to fit.
        overwrite: whether to replace the run that is in its folder.

    Raises:
        UserError: The run cannot be carried out as it is written; nothing was written.
        JobError: Training failed.
    """
    if resume == "auto" and (trained := finished(run)) is not None:
        return trained
    job = TrainingJob(run, resume, force, overwrite)
    if job.choice.warning:
        warnings.warn(job.choice.warning, RuntimeWarning, stacklevel=2)
    return finish(job, listeners)


def finish(job: TrainingJob, listeners: Sequence[Hook] = ()) -> Trained:
    """Train a job that is loaded, and write all that belongs to its folder; the adapter comes last of it."""
    called = tuple(hook if isinstance(hook, Listener) else RecordListener(hook) for hook in listeners)
    title = f"{job.folder.path.name}: {job.run.model.base}"

    def write_extras(folder: Path, steps: int, loss: float | None) -> None:
        write_passport(job, folder, {"steps": steps, "final_loss": loss, "parameters": job.parameters})
        or_warn("the card", lambda: write_card(job, folder))
        or_warn("loss.png", lambda: plot_loss(read_metrics(job.folder.metrics), job.folder.loss_plot, title))

    return job.fit(called, write_extras)
