"""Training a run, and what is written beside its adapter."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from veneer.api.warned import or_warn
from veneer.config import Run
from veneer.release import write_card, write_passport
from veneer.report import plot_loss
from veneer.training import Listener, Resume, Trained, TrainingJob, finished
from veneer.training.metrics import read_metrics


def train(
    run: Run,
    resume: Resume = False,
    listeners: Sequence[Listener] = (),
    force: bool = False,
    overwrite: bool = False,
) -> Trained:
    """Carry out a run: load, train, write the adapter with its card and the picture of its loss.

    Args:
        run: The settings.
        resume: Go on from the run's last checkpoint. "auto": begin where there is no run yet, go on where there is
            one, and give the report of one that is finished.
        listeners: Hear of each step.
        force: Start even if it is foreseen not to fit.
        overwrite: Replace the run that is in its folder.

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


def finish(job: TrainingJob, listeners: Sequence[Listener] = ()) -> Trained:
    """Train a job that is loaded, and write all that belongs to its folder; the adapter comes last of it."""
    title = f"{job.folder.path.name}: {job.run.model.base}"

    def write_extras(folder: Path, steps: int, loss: float | None) -> None:
        write_passport(job, folder, {"steps": steps, "final_loss": loss, "parameters": job.parameters})
        or_warn("the card", lambda: write_card(job, folder))
        or_warn("loss.png", lambda: plot_loss(read_metrics(job.folder.metrics), job.folder.loss_plot, title))

    return job.fit(tuple(listeners), write_extras)
