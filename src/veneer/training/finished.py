"""Reports what a run came to: after its last step, or from the files of one that is finished."""

import contextlib
from dataclasses import asdict, dataclass
from typing import Any

from veneer.config import Run, RunFolder, UserError, load_run
from veneer.training.best import BestStep
from veneer.training.metrics import read_metrics
from veneer.training.same_settings import LENGTH, differences, require_same_settings


@dataclass(frozen=True)
class Trained:
    """The report of a finished run.

    Attributes:
        steps: Steps that were made; fewer than planned where training ended early.
        final_loss: Loss of the last step; None: no record of it is left.
        best_step, best_value: The best step by the metric of `train.early_stopping`, and its value; None: nothing was
            measured.
        kept_step: The step whose adapter was delivered.
    """

    run_dir: str
    steps: int
    final_loss: float | None
    tokens_per_second: float
    peak_bytes: int
    best_step: int | None = None
    best_value: float | None = None
    kept_step: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def finished(run: Run, extend: bool = False) -> Trained | None:
    """Return the report of a finished run; None: it is not finished, or is to become longer.

    Args:
        run: The settings.
        extend: Whether the run may have become longer.

    Raises:
        UserError: It was another run: its settings differ.
    """
    folder = RunFolder(run.train.output_dir.expanduser())
    if not (folder.run.exists() and folder.is_finished):
        return None
    run = with_found(run, folder)
    require_same_settings(folder, run, extend)
    if extend and differences(load_run(folder.run), run).keys() & LENGTH:
        return None
    with contextlib.suppress(OSError, UserError), folder.locked():  # it may be read-only, or about to end
        folder.clear_unfinished()
    lines = read_metrics(folder.metrics)
    steps = [line for line in lines if line["kind"] == "train"]
    seconds = sum(line["seconds"] for line in steps)
    done = max((line["step"] for line in lines), default=0)
    best = BestStep(run.train.early_stopping)
    best.take_last(lines)
    return Trained(
        run_dir=str(folder.path),
        steps=done,
        final_loss=last_loss(folder),
        tokens_per_second=round(sum(line["tokens"] for line in steps) / seconds, 1) if seconds else 0.0,
        peak_bytes=max((line["peak_bytes"] for line in steps), default=0),
        **best.as_dict(),
        kept_step=best.kept_step(run.train.keep, done),
    )


def with_found(run: Run, folder: RunFolder) -> Run:
    """Return the run with what its folder says was found for it (a rate, masters), where it asks for it to be found."""
    found = load_run(folder.run)
    if run.model.dtype == "auto":
        run = run.model_copy(update={"model": run.model.model_copy(update={"dtype": found.model.dtype})})
    names = ("learning_rate", "master_weights", "optim")
    settings = {name: getattr(found.train, name) for name in names if getattr(run.train, name) == "auto"}
    return with_train(run, **settings)


def with_train(run: Run, **settings: Any) -> Run:
    """Return the run with other settings of the section `train`."""
    return run.model_copy(update={"train": run.train.model_copy(update=settings)})


def last_loss(folder: RunFolder) -> float | None:
    """Return the loss of the last logged step."""
    return next((line["loss"] for line in reversed(read_metrics(folder.metrics)) if line["kind"] == "train"), None)
