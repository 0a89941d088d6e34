"""Scores and their intervals, and generation."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.notices import notified
from tests.support.runs import scorer, tiny_run, write_rows
from veneer.config import UserError
from veneer.config.sampling import Sampling
from veneer.data.conversation import Message
from veneer.evaluation.compare import Evaluation, Score
from veneer.evaluation.generation import generate
from veneer.evaluation.metrics import measure
from veneer.evaluation.metrics.metric import Sample, ScoredRows
from veneer.evaluation.metrics.perplexity import Perplexity
from veneer.training.intervals import proportion
from veneer.training.job import TrainingJob


def test_wilsons_interval() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    interval = proportion(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    assert proportion(0, 10).low == 0.0
    assert proportion(10, 10).high == 1.0


def test_perplexity_weighs_tokens_and_its_interval_holds_the_value() -> None:
    interval = Perplexity([2.0, 9.0], [2, 3]).interval
    assert interval.value == pytest.approx(math.exp(11 / 5))
    assert interval.low == pytest.approx(math.e)
    assert interval.high == pytest.approx(math.exp(3))
    assert Perplexity([1.0] * 9, [1] * 9).interval.low == pytest.approx(math.e)


@pytest.fixture
def job(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> TrainingJob:
    """A tiny model that has learnt its sixteen rows by heart, which are its held-out rows too."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run = tiny_run(
        tiny_model(),
        path,
        tmp_path / "run",
        data={"validation": path, "duplicates": "keep"},
        train={"max_steps": 120, "per_device_train_batch_size": 8},
        adapter={"r": 16, "lora_alpha": 32},
        evaluate={"max_new_tokens": 12},
    )
    trained = TrainingJob(run)
    trained.fit()
    return trained


def test_a_model_that_learnt_its_rows_scores_higher_than_its_base(job: TrainingJob) -> None:
    result = scorer(job, job.data.held_out()).compare(job.engine.adapter_off)
    metrics = result.as_dict()["metrics"]
    assert metrics["exact_match"]["base"]["value"] == 0
    assert metrics["exact_match"]["tuned"]["value"] > 0.9
    assert metrics["perplexity"]["tuned"]["value"] < metrics["perplexity"]["base"]["value"]
    assert result.is_better
    samples = result.samples()
    assert len(samples) == 16
    assert all(sample["tuned_right"] == (sample["tuned"] == sample["reference"]) for sample in samples)

    # Answers do not depend on what they are batched with, and come in the order of the prompts.
    prompts = [job.renderer.prompt_ids([Message("user", sample["prompt"])]) for sample in samples]
    for size in (1, 5):
        assert generate(job.model, job.renderer, prompts, 12, size) == [sample["tuned"] for sample in samples]
    # Generation stops at the end token and not before: the answers are of one to three words.
    assert {len(answer) for answer in generate(job.model, job.renderer, prompts, 12)} == {3, 6, 9}
    # Temperature samples.
    hot = Sampling(temperature=5.0)
    assert generate(job.model, job.renderer, prompts, 12, sampling=hot) != [s["tuned"] for s in samples]


def test_commands_on_a_finished_run(job: TrainingJob) -> None:
    folder = job.folder.path
    record = veneer.evaluate(folder)
    assert (record.is_record, record.file) == (True, folder / "evaluation.json")
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 16
    kept = {name: (folder / name).read_bytes() for name in ("evaluation.json", "samples.jsonl")}
    result = veneer.evaluate(folder, rows=6)
    assert result.as_dict()["rows"] == 6
    assert (result.is_record, result.file) == (False, folder / "evaluations" / "held-out-6-rows.json")
    assert result.samples is not None
    assert len(result.samples.read_text().splitlines()) == 6
    samples = result.evaluation.samples()
    (answer,) = veneer.generate(str(folder), [samples[0]["prompt"]], compare_with_base=True, max_new_tokens=12)
    assert answer["answer"] == samples[0]["tuned"]
    assert answer["base"] != answer["answer"]
    (plain,) = veneer.generate(job.run.model.base, [answer["prompt"]], max_new_tokens=12)
    assert plain["answer"] == answer["base"]
    # Rows added since would move rows that were trained on into the held-out part.
    with (folder.parent / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "new", "completion": "row"}\n')
    with pytest.raises(UserError, match="its rows are not those of training"):
        veneer.evaluate(folder)
    for name in ("rows-17-rows.json", "rows-17-rows-2.json"):
        other = veneer.evaluate(folder, data=str(folder.parent / "rows.jsonl"))
        assert other.file is not None
        assert (other.as_dict()["rows"], other.file.name, other.is_record) == (17, name, False)
    assert {name: (folder / name).read_bytes() for name in kept} == kept, "the run's record stays as it is"
    with pytest.raises(UserError, match="nothing to compare"):
        veneer.generate(job.run.model.base, ["x"], compare_with_base=True)


def test_pieces_of_a_long_text_are_one_row(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    texts = [{"text": f"{animal} says " * 60} for animal in ("the cat", "the dog", "the owl")]
    path = write_rows(tmp_path / "texts.jsonl", texts)
    data = {"validation": path, "duplicates": "keep", "max_length": 64}
    job = TrainingJob(tiny_run(tiny_model(), path, tmp_path / "run", data=data, train={"max_steps": 1}))
    with notified("held-out rows were trained"):
        job.fit()
    held_out = job.data.held_out()
    assert len(held_out) > 6
    found = scorer(job, held_out).compare(job.engine.adapter_off).tuned
    perplexity = found.results["perplexity"]
    assert isinstance(perplexity, Perplexity)
    assert (found.rows, len(perplexity.losses), len(perplexity.tokens)) == (3, 3, 3)
    assert sum(perplexity.tokens) == sum(row.example.weight for row in held_out)
    record = veneer.evaluate(job.folder.path, rows=2)
    assert record.file is not None
    assert (record.is_record, record.file.name, record.as_dict()["rows"]) == (False, "held-out-2-rows.json", 2)


def test_better_means_beyond_chance() -> None:
    def score(hits: int) -> Score:
        samples = [Sample("", "", "a", "a" if n < hits else "b") for n in range(20)]
        return Score(measure(ScoredRows(samples)), samples, 20)

    assert Evaluation(score(1), score(15)).is_better
    assert not Evaluation(score(9), score(10)).is_better
    assert not Evaluation(score(10), score(10)).is_better
