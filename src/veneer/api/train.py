"""Trains a run, and writes the files beside its adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.api.live_page import LivePage
from veneer.config import Run
from veneer.config.notify import collected, notify, notify_on_error
from veneer.evaluation.classification import DuringClassification
from veneer.evaluation.during import DuringTraining
from veneer.evaluation.embedding import DuringEmbedding
from veneer.evaluation.metrics import require_metrics
from veneer.evaluation.tagging import DuringTagging
from veneer.model.pooling import find_pooling
from veneer.release.passport import write_passport
from veneer.release.publish.card import write_card
from veneer.release.redact import public_ledger, public_settings, without_paths
from veneer.release.sentence_transformers import write_sentence_transformers
from veneer.report.plots import plot_loss
from veneer.training.finished import Trained, finished
from veneer.training.job import MakeDuring, Resume, TrainingJob
from veneer.training.metrics import Listener, read_metrics
from veneer.training.pair_values import ACCURACIES, MARGINS
from veneer.training.trackers import require_trackers
from veneer.training.trackers.tracking import Tracking

DURING: dict[str, MakeDuring] = {
    "causal-lm": DuringTraining,
    "sequence-classification": DuringClassification,
    "token-classification": DuringTagging,
    "embedding": DuringEmbedding,
    "reward": DuringTraining,
}


def train(
    run: Run,
    resume: Resume = False,
    listeners: Sequence[Listener] = (),
    force: bool = False,
    overwrite: bool = False,
    extend: bool = False,
    fork: str | Path | None = None,
) -> Trained:
    """Carry out a run: load, train, write the adapter with its card and the picture of its loss.

    Example:
        trained = veneer.train(run, listeners=[listen])
        print(trained.run_dir, trained.final_loss)

    Args:
        run: settings of the run.
        resume: whether to go on from the run's last checkpoint, or the name of the one to go on from (step-000200). A
            run that is finished is not trained again, its report is given. "auto": begin where there is no run yet.
        listeners: functions that are called with each record of metrics.jsonl: a logged step or an evaluation.
        force: whether to start a run that is predicted not to fit.
        overwrite: whether to replace the run that is in its folder.
        extend: whether to go on with more steps (`train.max_steps`, `train.num_train_epochs`) than the run began with.
        fork: another run, or a checkpoint of one, whose state this run begins with.

    Raises:
        UserError: The run cannot be carried out as it is written; nothing was written.
        JobError: Training failed.
    """
    if (resume in (True, "auto") or extend) and (trained := finished(run, extend)) is not None:
        return trained
    require_trackers(run.train.report_to)
    require_metrics(run.evaluate)
    with collected():
        return finish(load_job(run, resume, force, overwrite, extend, fork), listeners)


def load_job(
    run: Run,
    resume: Resume = False,
    force: bool = False,
    overwrite: bool = False,
    extend: bool = False,
    fork: str | Path | None = None,
) -> TrainingJob:
    """Check and load a run, ready to train; arguments and errors are those of `train`."""
    source = None if fork is None else Path(fork)
    return TrainingJob(run, resume, force, overwrite, DURING[run.model.task], extend=extend, fork=source)


def finish(job: TrainingJob, listeners: Sequence[Listener] = ()) -> Trained:
    """Train a job that is loaded, and write all that belongs to its folder; the adapter comes last of it."""
    if job.choice.warning:
        notify(job.choice.warning, where="train.engine")
    title = f"{job.folder.path.name}: {job.run.model.base}"

    def write_extras(folder: Path, trained: Trained) -> None:
        report = trained.as_dict()
        training = {name: report[name] for name in ("steps", "final_loss", "best_step", "best_value", "kept_step")}
        training |= _of_pairs(job, trained)
        write_passport(job, folder, training | {"planned_steps": job.steps, "parameters": job.parameters})
        if job.run.model.task == "embedding":
            size, most = job.model.config.hidden_size, job.run.data.max_length - 1
            write_sentence_transformers(folder, find_pooling(job.run.model), size, most)
        notify_on_error("the card", lambda: write_card(job, folder))
        notify_on_error("loss.png", lambda: plot_loss(read_metrics(job.folder.metrics), job.folder.loss_plot, title))

    tracking = Tracking(job.run.train.report_to, job.folder, lambda: _described(job))
    with LivePage(job.folder) as page, tracking:
        return job.fit((*listeners, tracking, page), write_extras)


def _described(job: TrainingJob) -> dict[str, dict[str, Any]]:
    """Return what trackers are told of a run: like all that leaves the machine, without paths and rows."""
    return {
        "run.yaml": public_settings(job.run.model_dump(mode="json")),
        "plan.json": without_paths(job.plan()),
        "ledger.json": public_ledger(job.data.ledger.as_dict(), job.folder.ledger.read_bytes(), with_rows=False),
    }


def _of_pairs(job: TrainingJob, trained: Trained) -> dict[str, Any]:
    """Return what the passport says of held-out pairs at the step that a run delivers."""
    if job.objective.documents_per_row != 2:
        return {}
    lines = read_metrics(job.folder.metrics)
    measured = next((one for one in lines if one["kind"] == "eval" and one["step"] == trained.kept_step), {})
    held_out = {
        metric: {"value": measured[metric], "interval": measured["intervals"].get(metric)}
        for metric in (MARGINS, ACCURACIES)
        if measured.get(metric) is not None
    }
    return {"held_out_pairs": held_out}
