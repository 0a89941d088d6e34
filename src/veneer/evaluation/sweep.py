"""Carries out a sweep: has each trial trained, stops losers, and says which combination to take.

A trial is one combination of settings with one seed. It is a run of its own in trials/NAME of the sweep's folder, made
by the same `TrainingJob` (trials.py), so that what a sweep finds `veneer train` gives again. Rows are split by the
run's own seed: all trials are measured on the same held-out rows, and compared in pairs (training/paired_losses.py).

At a rung (successive halving, arXiv 1502.07943) a combination is stopped if it is in the worse half and its loss is
shown to be worse than the best one's, so that noise stops none. trials.jsonl gets a line for each measurement; all
decisions follow from these lines, so that an interrupted sweep goes on with the same ones.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config import Interrupted, JobError, Run
from veneer.config.files import read_json_lines
from veneer.config.folder import remove, write_text
from veneer.config.sweep import Combination, PlannedSweep
from veneer.evaluation.trials import Measurer, Trial
from veneer.training.intervals import Interval
from veneer.training.paired_losses import RowLosses, loss_difference, loss_interval

OnRecord = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class CombinationResult:
    """The result of one combination.

    Attributes:
        combination: The combination.
        status: finished; stopped at a rung; or failed.
        trainable: Trained parameters; None: it failed before they were counted.
        steps: Optimizer steps that were made.
        seconds: Time of these steps with one seed; None: it is not known.
        loss: Held-out loss over its seeds, with its interval; None: it failed.
        difference: Its loss less that of the best, or where it was stopped of the best then.
        message: Reason why it failed; empty: it did not.
    """

    combination: Combination
    status: str
    trainable: int | None = None
    steps: int = 0
    seconds: float | None = None
    loss: Interval | None = None
    difference: Interval | None = None
    message: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "number": self.combination.number,
            "settings": self.combination.settings,
            "status": self.status,
            "trainable": self.trainable,
            "steps": self.steps,
            "seconds": self.seconds,
            "loss": self.loss and self.loss.as_dict(),
            "difference": self.difference and self.difference.as_dict(),
            "message": self.message,
        }


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep.

    Attributes:
        combinations: All of them, in their order.
        best: The finished one of the lowest held-out loss.
        sweet_spot: The smallest, by trained parameters, whose loss is not shown to be worse than the best.
        seeds: Number of seeds of each.
        rows: Held-out rows.
    """

    combinations: tuple[CombinationResult, ...]
    best: CombinationResult
    sweet_spot: CombinationResult
    seeds: int
    rows: int

    @property
    def failed(self) -> int:
        """Number of combinations of which a trial failed."""
        return sum(result.status == "failed" for result in self.combinations)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of results.json."""
        return {
            "combinations": [result.as_dict() for result in self.combinations],
            "best": self.best.combination.number,
            "sweet_spot": self.sweet_spot.combination.number,
            "failed": self.failed,
            "seeds": self.seeds,
            "rows": self.rows,
        }


class SweepLoop:
    """Has the trials of a sweep measured, and decides by what they came to.

    Args:
        planned: The sweep.
        folder: The sweep's folder.
        measurer: Trainer of the trials.
        on_record: Callback that gets each new line of trials.jsonl.
    """

    def __init__(
        self,
        planned: PlannedSweep,
        folder: Path,
        measurer: Measurer,
        on_record: OnRecord = lambda record: None,
    ) -> None:
        self._sweep, self._run, self._combinations = planned.sweep, planned.run, planned.combinations
        self._folder, self._measurer, self._on_record = folder, measurer, on_record
        self._seeds = seeds_of(planned)
        self._file = folder / "trials.jsonl"
        self._records = {(record["trial"], record["rung"]): record for record in self._read()}

    @property
    def missing(self) -> int:
        """Number of trials that have no result yet; those of a combination that was stopped count until it is known."""
        ended = {name for (name, rung), record in self._records.items() if rung is None or record["status"] == "failed"}
        return sum(trial.name not in ended for trial in self._trials(self._combinations))

    def run(self) -> SweepResult:
        """Train all trials that have no result yet.

        Raises:
            Interrupted: The user stopped it.
            JobError: Every combination failed.
        """
        ended: dict[int, CombinationResult] = {}
        alive = list(self._combinations)
        for rung in (*self._sweep.rungs, None):
            for facts, was_stopped in self._measurer.measured(self._unmeasured(alive, rung), rung):
                self._write(facts)
                if was_stopped:
                    raise Interrupted(self._folder)
            for combination in list(alive):
                if message := self._failure(combination):
                    alive.remove(combination)
                    ended[combination.number] = CombinationResult(combination, "failed", message=message)
                    self._drop([combination])
            if not alive:
                messages = "; ".join(f"{result.combination.name}: {result.message}" for result in ended.values())
                raise JobError(f"no combination could be trained: {messages}")
            if rung is not None:
                for result in self._losers(alive, rung):
                    alive.remove(result.combination)
                    ended[result.combination.number] = result
                    self._drop([result.combination])
        return self._result(alive, ended)

    def _unmeasured(self, combinations: Sequence[Combination], rung: int | None) -> Iterator[Trial]:
        """Yield the trials that have no result at a rung, and none of whose combination has failed by then."""
        for trial in self._trials(combinations):
            if (trial.name, rung) not in self._records and not self._failure(trial.combination):
                yield trial

    def _trials(self, combinations: Sequence[Combination]) -> Iterator[Trial]:
        for combination in combinations:
            for seed in self._seeds:
                yield Trial(combination, seed)

    def _failure(self, combination: Combination) -> str:
        """Return why a trial of a combination failed; empty: none has."""
        names = {trial.name for trial in self._trials([combination])}
        failed = (r for r in self._records.values() if r["trial"] in names and r["status"] == "failed")
        return next((str(record["message"]) for record in failed), "")

    def _losses(self, combination: Combination, rung: int | None) -> list[RowLosses]:
        """Return the losses of a combination with each seed."""
        found = (self._records[trial.name, rung] for trial in self._trials([combination]))
        return [RowLosses(tuple(record["losses"]), tuple(record["weights"])) for record in found]

    def _measured(self, combination: Combination, rung: int | None, best: Combination) -> CombinationResult:
        record = self._records[next(self._trials([combination])).name, rung]
        losses = self._losses(combination, rung)
        return CombinationResult(
            combination,
            status="finished" if rung is None else "stopped",
            trainable=record["trainable"],
            steps=record["steps"],
            seconds=record.get("seconds"),
            loss=loss_interval(losses),
            difference=loss_difference(losses, self._losses(best, rung)),
        )

    def _ranked(self, combinations: Sequence[Combination], rung: int | None) -> list[CombinationResult]:
        """Return combinations, the one of the lowest loss first, each compared with it."""
        best = min(combinations, key=lambda one: loss_interval(self._losses(one, rung)).value)
        results = [self._measured(one, rung, best) for one in combinations]
        return sorted(results, key=_loss)

    def _losers(self, alive: Sequence[Combination], rung: int) -> list[CombinationResult]:
        """Return those in the worse half that are shown to be worse than the best."""
        ranked = self._ranked(alive, rung)
        return [result for result in ranked[math.ceil(len(ranked) / 2) :] if _is_worse(result)]

    def _result(self, alive: Sequence[Combination], ended: dict[int, CombinationResult]) -> SweepResult:
        ranked = self._ranked(alive, None)
        best = ranked[0]
        sweet_spot = min(
            (result for result in ranked if not _is_worse(result)),
            key=lambda result: (result.trainable or 0, _loss(result)),
        )
        ended |= {result.combination.number: result for result in ranked}
        winners = {best.combination.number, sweet_spot.combination.number}
        self._drop([one for one in alive if one.number not in winners])
        for trial in self._trials([best.combination, sweet_spot.combination]):
            if trial.seed != self._run.train.seed:
                self._drop_trial(trial)
        rows = len(self._losses(best.combination, None)[0].losses)
        results = tuple(ended[number] for number in sorted(ended))
        return SweepResult(results, best, sweet_spot, len(self._seeds), rows)

    def _drop(self, combinations: Sequence[Combination]) -> None:
        for trial in self._trials(combinations):
            self._drop_trial(trial)

    def _drop_trial(self, trial: Trial) -> None:
        """Delete a trial's folder, unless all are to be kept."""
        if not self._sweep.keep_runs:
            remove(self._folder / "trials" / trial.name)

    def _read(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        return read_json_lines(self._file, "trial", "rung", "status")

    def _write(self, record: dict[str, Any]) -> None:
        self._records[record["trial"], record["rung"]] = record
        write_text(self._file, "".join(json.dumps(one) + "\n" for one in self._records.values()))
        self._on_record(record)


def seeds_of(planned: PlannedSweep) -> range:
    """Return the seeds with which each combination is trained."""
    first = planned.run.train.seed
    return range(first, first + planned.sweep.seeds)


def trials_of(planned: PlannedSweep) -> list[Trial]:
    """Return all trials of a sweep."""
    return [Trial(combination, seed) for combination in planned.combinations for seed in seeds_of(planned)]


def winning_run(result: CombinationResult, output_dir: Path) -> Run:
    """Return the run of a combination, with the run's own seed, in a folder of its own."""
    run = result.combination.run
    return run.model_copy(update={"train": run.train.model_copy(update={"output_dir": output_dir})})


def _loss(result: CombinationResult) -> float:
    assert result.loss is not None
    return result.loss.value


def _is_worse(result: CombinationResult) -> bool:
    return result.difference is not None and result.difference.low > 0
