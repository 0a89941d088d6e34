"""Faults of a training that its loss does not show are planted, and told within 20 steps; a sound run tells nothing."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.notices import notified
from tests.support.runs import some_rows, tiny_run, write_rows
from veneer.data.batch import Batch
from veneer.engine.objective import Objective, StepOutput
from veneer.training.alarms import ALARMS
from veneer.training.alarms.alarm import JobFacts, WatchedStep
from veneer.training.alarms.machine import HalfSpeed, MemoryCreeping
from veneer.training.alarms.numbers import NumbersMissing
from veneer.training.job import TrainingJob

STEPS = 20
Change = Callable[[TrainingJob, Batch, StepOutput], StepOutput]


def in_batches(change: Callable[[TrainingJob, int], list[Batch]]) -> Callable[[TrainingJob], None]:
    """A plant in what the loop is given as a step."""

    def plant(job: TrainingJob) -> None:
        job._batches.step = lambda number: change(job, number)  # type: ignore[method-assign]

    return plant


def in_passes(change: Change) -> Callable[[TrainingJob], None]:
    """A plant in what a training pass leaves."""

    def plant(job: TrainingJob) -> None:
        inner = job.engine.forward_backward

        def changed(batch: Batch, objective: Objective) -> StepOutput:
            return change(job, batch, inner(batch, objective))

        job.engine.forward_backward = changed  # type: ignore[method-assign]

    return plant


def everything_trained(job: TrainingJob, number: int) -> list[Batch]:
    def unmasked(batch: Batch) -> Batch:
        ends = torch.tensor(batch.lengths).cumsum(0) - 1
        targets_T = batch.ids_T.roll(-1).index_fill(0, ends, -100)
        weights_T = (targets_T >= 0).float()
        trained = int(weights_T.sum())
        return replace(batch, targets_T=targets_T, weights_T=weights_T, trained=trained, weight=float(trained))

    return [unmasked(job._batches.batch_of(members)) for members in job._batches.members_of_step(number)]


def leaks(job: TrainingJob) -> None:
    """Attention runs across the documents of a batch."""

    def joined(batch: Batch) -> Batch:
        return replace(batch, lengths=(len(batch.ids_T),))

    engine, train, measure = job.engine, job.engine.forward_backward, job.engine.token_logprobs
    engine.forward_backward = lambda batch, objective: train(joined(batch), objective)  # type: ignore[method-assign]
    engine.token_logprobs = lambda batch: measure(joined(batch))  # type: ignore[method-assign]


def ignores_warm_up(job: TrainingJob) -> None:
    optimizer = job._loop._optimizer
    step = optimizer.step

    def at_peak() -> Any:
        for group in optimizer.param_groups:
            group["lr"] = job.run.train.learning_rate
        return step()

    optimizer.step = at_peak  # type: ignore[method-assign, assignment]


def mean_of_all() -> Change:
    """The loss is the mean of all passes so far, as a logger that averages has it."""
    losses: list[torch.Tensor] = []

    def change(job: TrainingJob, batch: Batch, output: StepOutput) -> StepOutput:
        losses.append(output.loss / output.weight)
        return output._replace(loss=torch.stack(losses).mean() * output.weight)

    return change


def without_nan(job: TrainingJob, batch: Batch, output: StepOutput) -> StepOutput:
    return output._replace(loss=(output.loss * float("nan")).nan_to_num())


def layer_without_gradient() -> Change:
    """From the third step on."""
    made = count()

    def change(job: TrainingJob, batch: Batch, output: StepOutput) -> StepOutput:
        if next(made) >= 2:
            for name, parameter in job.model.named_parameters():
                if ".layers.1." in name and parameter.grad is not None:
                    parameter.grad.zero_()
        return output

    return change


def same_rows(job: TrainingJob, number: int) -> list[Batch]:
    return [job._batches.batch_of(members) for members in job._batches.members_of_step(0)]


def held_out_too(job: TrainingJob, number: int) -> list[Batch]:
    members = job._batches.members_of_step(number)
    return [*map(job._batches.batch_of, members), Batch.of([job.held_out[number % len(job.held_out)]])]


PLANTS: dict[str, tuple[Callable[[TrainingJob], None], str]] = {
    "MaskingOff": (in_batches(everything_trained), "prompts are trained: .* fix: .*data.format"),
    "DocumentsLeak": (leaks, "documents of a batch see each other: .* fix: set data.packing to false"),
    "RateNotScheduled": (ignores_warm_up, "another rate is applied.* fix: .*train.optim"),
    "LossNotOwn": (in_passes(mean_of_all()), "not the step's own loss.* fix: set train.engine"),
    "NumbersMissing": (in_passes(without_nan), "the loss was exactly 0 in the last 3 steps.* fix: set model.dtype"),
    "LayerWithoutGradient": (in_passes(layer_without_gradient()), "layers 1 have had no gradient .* fix: .*adapter."),
    "RowsRepeated": (in_batches(same_rows), "rows come more than once .* fix: set data.duplicates"),
    "HeldOutTrained": (in_batches(held_out_too), "held-out rows were trained by step .* fix: .*data.duplicates"),
}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [row | {"prompt": f"{row['prompt']} {n}{row['prompt']}"} for n in range(7) for row in some_rows()]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


def make_job(base: Path, rows_file: str, folder: Path, **train: Any) -> TrainingJob:
    settings = {"max_steps": STEPS, "warmup_ratio": 0.5, "eval_steps": None, "save_steps": None} | train
    data = {"packing": True, "max_length": 96, "validation": 4}
    return TrainingJob(tiny_run(base, rows_file, folder, data=data, train=settings))


@pytest.mark.parametrize("fault", PLANTS)
def test_a_fault_is_told_once_within_20_steps(
    fault: str, tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path
) -> None:
    plant, message = PLANTS[fault]
    job = make_job(tiny_model(), rows_file, tmp_path / "run")
    plant(job)
    with notified("(?s)" + message) as told:
        job.fit()
    assert len(told) == len(set(told))
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert told[0].splitlines()[0][:40] in events


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_a_sound_run_tells_nothing(
    engine: str, tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path
) -> None:
    """Any warning would fail the test."""
    make_job(tiny_model(), rows_file, tmp_path / "run", engine=engine, optim="adamw_8bit").fit()


def told_by(alarm: Any, records: list[dict[str, Any]]) -> list[int]:
    """The steps at which an alarm tells something, of records of steps alone."""
    return [n for n, record in enumerate(records, 1) if alarm.after(WatchedStep(n, n, (), None, 1, record))]  # type: ignore[arg-type]


def test_half_the_speed_of_the_plan_or_of_the_start_is_told() -> None:
    facts = JobFacts(None, device="cuda", planned_speed=1000.0)  # type: ignore[arg-type]
    slow, fast = {"tokens_per_second": 480.0}, {"tokens_per_second": 900.0}
    assert told_by(HalfSpeed(facts), [slow] * STEPS)[0] <= STEPS
    assert told_by(HalfSpeed(facts), [slow] * 4 + [fast] * 40) == []
    assert told_by(HalfSpeed(facts), [fast] * 20 + [{"tokens_per_second": 430.0}] * STEPS)[0] <= 20 + STEPS
    assert told_by(HalfSpeed(replace(facts, device="cpu")), [slow] * STEPS) == []


def test_memory_that_grows_is_told() -> None:
    def told(sizes: list[int], device: str = "cuda") -> list[int]:
        left = iter(sizes)
        facts = JobFacts(None, device=device, memory=lambda: next(left) * 2**20)  # type: ignore[arg-type]
        return told_by(MemoryCreeping(facts), [{}] * len(sizes))

    assert told([1000 + 10 * n for n in range(STEPS)])[0] <= STEPS
    assert told([1000 + n for n in range(100)]), "slowly"
    assert told([1000 + 10 * (n % 7) for n in range(100)]) == []
    assert told([1000 + 30 * min(n, 8) for n in range(100)]) == [], "it fills up at first"
    assert told([1000 + 10 * n for n in range(STEPS)], "cpu") == []


def test_updates_that_overflow_and_metrics_that_are_gone_are_told() -> None:
    facts = JobFacts(None)  # type: ignore[arg-type]
    good: dict[str, Any] = {"loss": 1.0, "grad_norm": 0.5, "nll_loss": 1.0}
    assert told_by(NumbersMissing(facts), [good | {"grad_norm": None}] * STEPS)[0] <= STEPS
    assert told_by(NumbersMissing(facts), [good | {"grad_norm": None}] * 8 + [good] * STEPS) == []
    assert told_by(NumbersMissing(facts), [good, *[{"loss": 1.0, "grad_norm": 0.5}] * STEPS])[0] <= STEPS


def test_each_alarm_is_planted_and_says_what_it_cannot_see() -> None:
    names = {alarm.__name__ for alarm in ALARMS}
    assert names == {*PLANTS, "HalfSpeed", "MemoryCreeping"}
    for alarm in ALARMS:
        assert "cannot see" in " ".join(str(alarm.__doc__).split()), alarm
