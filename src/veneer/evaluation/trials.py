"""Trains and measures single trials of a sweep, on one loaded base.

A process has one `Trials`: that of the sweep itself, or each of those in which trials run side by side
(trial_processes.py). What a trial came to is a line of trials.jsonl, whoever made it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from veneer.config import Interrupted, JobError, Run, RunFolder, UserError
from veneer.config.folder import remove
from veneer.config.sweep import Combination, PlannedSweep
from veneer.training.job import TrainingJob
from veneer.training.metrics import read_metrics
from veneer.training.objectives import OBJECTIVES
from veneer.training.parts import RunParts, fresh_parts, load_parts
from veneer.training.run_batches import batches_of

Measured = tuple[dict[str, Any], bool]  # a line of trials.jsonl, and whether the user asked for a stop meanwhile


@dataclass(frozen=True)
class Trial:
    """One combination with one seed."""

    combination: Combination
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.combination.number:02d}-seed-{self.seed}"

    def run(self, folder: Path) -> Run:
        """Return its run, without what a sweep does itself: held-out losses on the way, and checkpoints."""
        run = self.combination.run
        own = {"seed": self.seed, "output_dir": folder, "eval_steps": None, "save_steps": None, "save_total_limit": 1}
        return run.model_copy(update={"train": run.train.model_copy(update=own)})


class Measurer(Protocol):
    """Trains and measures trials, one after the other or side by side."""

    def load(self) -> None:
        """Load base and rows; raises what `Trials.load` does."""

    def measured(self, trials: Iterable[Trial], rung: int | None) -> Iterator[Measured]:
        """Yield what each trial came to at a rung, or at its end (None), as it comes; each is asked for when it begins.

        Raises:
            Interrupted: the user stopped it.
        """


class Trials:
    """Trains and measures trials in this process.

    Args:
        planned: the sweep.
        folder: folder of the sweep.
        finish: function that trains a job to its end and writes its adapter.
    """

    def __init__(self, planned: PlannedSweep, folder: Path, finish: Callable[[TrainingJob], Any]) -> None:
        self._sweep, self._run, self._combinations = planned.sweep, planned.run, planned.combinations
        self._folder, self._finish = folder, finish
        self._parts: RunParts | None = None

    def load(self) -> None:
        """Load base and rows.

        Raises:
            UserError: The run cannot be carried out, holds too few rows out, or ends before the last rung.
        """
        parts = load_parts(self._run)
        rows = len(parts.data.validation.rows)
        objectives = sorted({name for one in self._combinations for name in one.settings if _is_of_objective(name)})
        if objectives:
            raise UserError(
                f"a sweep compares trials by their held-out loss, which {', '.join(objectives)} would change the "
                "meaning of",
                "train each run by itself, and compare rewards/accuracies in the records of kind eval in metrics.jsonl",
            )
        if parts.data.kind == "rated":
            raise UserError(
                "a sweep compares trials by their loss on single answers or pairs of them, and its rows are rated",
                "train each run by itself, and compare the records of kind eval in their metrics.jsonl",
            )
        if rows < 2:
            raise UserError(
                f"a sweep compares trials by their loss on held-out rows, of which the run has {rows}; at least 2 are "
                "needed",
                "hold more rows out with data.validation",
            )
        for combination in self._combinations if self._sweep.rungs else ():
            train = combination.run.train
            documents = 2 if parts.data.has_pairs else 1
            steps = batches_of(combination.run, parts.data.train, documents).steps(
                train.num_train_epochs, train.max_steps
            )
            if self._sweep.rungs[-1] >= steps:
                raise UserError(
                    f"rungs = {list(self._sweep.rungs)}: a run with {combination.name} has {steps} steps",
                    "name steps before the last one",
                )
        self._parts = fresh_parts(parts, self._run)

    def measured(self, trials: Iterable[Trial], rung: int | None) -> Iterator[Measured]:
        """Yield what each trial came to, one after the other; see `Measurer`."""
        for trial in trials:
            yield self.measure(trial, rung)

    def measure(self, trial: Trial, rung: int | None) -> Measured:
        """Train a trial to a rung, or to its end (None).

        Raises:
            Interrupted: the user stopped it before it was measured.
        """
        folder = RunFolder(self._folder / "trials" / trial.name)
        if folder.is_finished:  # it had just ended when it was killed, before its line was written
            folder.remove()
        facts: dict[str, Any] = {"trial": trial.name, "settings": trial.combination.settings, "seed": trial.seed}
        facts |= {"rung": rung}
        was_stopped = False
        try:
            job = self._job(trial.run(folder.path))
            facts |= {"trainable": job.parameters["trainable"], "steps": rung or job.steps}
            if rung is None:
                self._finish(job)
                remove(folder.checkpoints)
            else:
                job.fit_until(rung)
            seconds = sum(record["seconds"] for record in read_metrics(folder.metrics) if record["kind"] == "train")
            losses = job.row_losses()
            was_stopped = job.was_stopped
            if not math.isfinite(losses.mean):
                raise JobError("the held-out loss is not finite\n  fix: lower train.learning_rate")
            facts |= {"status": "measured", "loss": losses.mean, "losses": losses.losses, "weights": losses.weights}
            facts |= {"seconds": round(seconds, 3)}
        except Interrupted:
            raise Interrupted(self._folder) from None
        except (JobError, UserError, torch.OutOfMemoryError) as error:
            facts |= {"status": "failed", "message": " ".join(str(error).split())}
        return facts, was_stopped

    def _job(self, run: Run) -> TrainingJob:
        if self._parts is None:
            self.load()
        assert self._parts is not None
        self._parts = fresh_parts(self._parts, run)
        during = {"evaluate": run.evaluate.model_copy(update={"during": ()})}  # trials are compared by losses alone
        run = run.model_copy(update=during)
        return TrainingJob(run, "auto", parts=self._parts)  # it goes on from a rung, or from an interruption


def _is_of_objective(setting: str) -> bool:
    """Return whether a setting says what is minimized, as train.objective or train.dpo."""
    section, _, name = setting.partition(".")
    return section == "train" and name in ("objective", "reference", *OBJECTIVES)
