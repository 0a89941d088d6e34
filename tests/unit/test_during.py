"""Metrics during training, early stopping, and the adapter that is delivered."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.support.notices import notified
from tests.support.runs import StopAt, tiny_run, write_rows
from veneer.api.train import load_job
from veneer.config import EarlyStopping, Interrupted, RunFolder, UserError
from veneer.data.pipeline import prepare
from veneer.data.render import Renderer
from veneer.evaluation.during import DuringTraining
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate
from veneer.report.run_page import run_page
from veneer.training import parts
from veneer.training.best import BestStep
from veneer.training.finished import finished
from veneer.training.metrics import read_metrics

Make = Callable[..., veneer.Run]
# The held-out answers are never those of the training: their loss falls while the form is learnt, and then rises.
RISES: dict[str, Any] = {"max_steps": 40, "eval_steps": 2, "save_steps": 5, "save_total_limit": 1}
RISES |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 8}
LARGE: dict[str, Any] = {"r": 16, "lora_alpha": 32}


@pytest.fixture
def make(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> Make:
    """Settings of a tiny run, in a folder by name; it holds out eight rows with other answers than its training's."""
    train = write_rows(tmp_path / "rows.jsonl", rows)
    other = [row | {"completion": ("please", "team")[n % 2]} for n, row in enumerate(rows[:8])]
    held_out = write_rows(tmp_path / "held-out.jsonl", other)

    def run(name: str, **sections: dict[str, Any]) -> veneer.Run:
        data = {"validation": held_out, "duplicates": "keep", "overlap": "report"} | sections.pop("data", {})
        return tiny_run(tiny_model(), train, tmp_path / name, data=data, **sections)

    return run


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = adapter(one), adapter(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "eval"]


def measured(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, but for their time and samples: the base's answers come once in a process."""
    return [
        {name: value for name, value in record.items() if name not in ("time", "samples")}
        for record in evaluations(folder)
    ]


def rates(folder: Path) -> list[float]:
    return [record["learning_rate"] for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]


def steps_of(folder: Path) -> list[int]:
    return [int(path.name[-6:]) for path in sorted((folder / "checkpoints").iterdir())]


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_measuring_answers_changes_no_bit_of_the_training(engine: str, make: Make, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "train": {"engine": engine, "eval_steps": 2},
        "adapter": {"lora_dropout": 0.2},
    }
    veneer.train(make("without", **settings))
    veneer.train(make("with", **settings, evaluate={"during": ["exact_match"], "max_new_tokens": 4}))
    assert same(tmp_path / "with" / "adapter", tmp_path / "without" / "adapter")
    plain, measured = evaluations(tmp_path / "without"), evaluations(tmp_path / "with")
    assert [record["step"] for record in measured] == [2, 4, 6]
    added = {"exact_match", "answered_rows", "samples", "time"}
    without = [{key: record[key] for key in record.keys() - {"time"}} for record in plain]
    assert [{key: record[key] for key in record.keys() - added} for record in measured] == without
    assert [["base" in sample for sample in record["samples"]] for record in measured] == [
        [True] * 3,
        *[[False] * 3] * 2,
    ]
    assert all(record["answered_rows"] == 8 and 0 <= record["exact_match"] <= 1 for record in measured)


def test_what_is_measured_is_what_the_model_answers(make: Make, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    learnt = write_rows(tmp_path / "learnt.jsonl", rows)
    train = {"max_steps": 120, "per_device_train_batch_size": 8, "eval_steps": 40}
    run = make(
        "run",
        data={"validation": learnt},
        train=train | {"early_stopping": {"metric": "exact_match", "patience": None}},
        adapter=LARGE,
        evaluate={"during": ["exact_match", "perplexity"], "max_new_tokens": 12},
    )
    trained = veneer.train(run)
    last = evaluations(tmp_path / "run")[-1]
    evaluated = veneer.evaluate(tmp_path / "run").as_dict()["metrics"]
    assert last["exact_match"] == evaluated["exact_match"]["tuned"]["value"] > 0.9
    assert trained.best_value == max(record["exact_match"] for record in evaluations(tmp_path / "run"))


def test_a_stop_while_it_answers_leaves_all_as_it_was(make: Make, tmp_path: Path) -> None:
    run = make("run", train={"eval_steps": 2}, evaluate={"during": ["exact_match"]})
    job = load_job(run)
    measure = DuringTraining(run, job.data, job.renderer).measure
    job.model.train()
    before = torch.get_rng_state()
    assert measure(job.model, job.engine, lambda: True) is None
    asked = iter([False, True])
    assert measure(job.model, job.engine, lambda: next(asked)) is None
    assert job.model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_sample_is_drawn_once_and_bounded_by_tokens(make: Make) -> None:
    def sample(seed: int, tokens: int, most: int | None = 200) -> DuringTraining:
        settings = {"during": ["exact_match"], "during_tokens": tokens, "rows": most, "max_new_tokens": 256}
        run = make("run", train={"seed": seed}, evaluate=settings)
        renderer = Renderer(load_tokenizer(locate(run.model)), run.data)
        return DuringTraining(run, prepare(run.data, renderer, seed), renderer)

    def places(sample: DuringTraining) -> list[str]:
        return [row.conversation.place for row in sample.rows]

    whole = sample(1, 16384)
    assert sorted(places(whole)) == sorted(set(places(whole)))
    assert len(whole.rows) == 8
    assert whole.max_new_tokens == 2 * max(row.example.trained for row in whole.rows), "not 256"
    assert places(whole) == places(sample(1, 16384))
    assert places(whole) != places(sample(2, 16384))
    few = sample(1, 150)
    assert places(few) == places(whole)[: len(few.rows)]
    own = [len(row.example.ids) - row.example.trained for row in whole.rows]  # but for what ends a turn
    taken = sum(few.max_new_tokens + tokens for tokens in own[: len(few.rows)])
    assert 1 < len(few.rows) < 8
    assert 100 < taken < 150 + len(few.rows)
    assert len(sample(1, 1).rows) == 1
    assert len(sample(1, 16384, 3).rows) == 3


def test_the_best_adapter_is_delivered_and_its_checkpoint_kept(make: Make, tmp_path: Path) -> None:
    last = veneer.train(make("last", train=RISES, adapter=LARGE))
    best = veneer.train(make("best", train=RISES | {"keep": "best"}, adapter=LARGE))
    found = evaluations(tmp_path / "best")
    lowest = min(found, key=lambda record: record["loss"])
    assert 2 < lowest["step"] < 30, "neither the first nor about the last: the run shows what it is to show"
    for report in (last, best):
        assert (report.best_step, report.best_value) == (lowest["step"], lowest["loss"])
        assert report.steps == 40
    assert (last.kept_step, best.kept_step) == (40, lowest["step"])
    assert (found[-1]["best_step"], found[-1]["best_value"]) == (lowest["step"], lowest["loss"])
    assert steps_of(tmp_path / "best") == [lowest["step"], 40]
    assert steps_of(tmp_path / "last") == [40]
    assert same(tmp_path / "best" / "adapter", tmp_path / "best" / "checkpoints" / f"step-{lowest['step']:06d}")
    assert same(tmp_path / "last" / "adapter", tmp_path / "best" / "checkpoints" / "step-000040")
    again = finished(make("best", train=RISES | {"keep": "best"}, adapter=LARGE))
    assert again is not None
    assert (again.steps, again.best_step, again.kept_step) == (40, lowest["step"], lowest["step"])

    passport = json.loads((tmp_path / "best" / "adapter" / "passport.json").read_text())
    assert passport["training"]["kept_step"] == lowest["step"]
    card = (tmp_path / "best" / "adapter" / "README.md").read_text()
    assert f"Best held-out loss after step {lowest['step']} (" in card
    assert f"the adapter is that of step {lowest['step']}." in card
    page = run_page(tmp_path / "best")
    assert f"the adapter is that of step <b>{lowest['step']}</b>" in page
    assert "last step 40" in page


def test_a_run_ends_early_and_goes_on_from_where_it_was(make: Make, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "train": RISES | {"keep": "best", "early_stopping": {"patience": 4, "min_delta": 0.001}},
        "adapter": LARGE | {"lora_dropout": 0.1},
        "evaluate": {"during": ["exact_match"], "max_new_tokens": 4},
    }
    whole = veneer.train(make("whole", **settings))
    assert f"ends early, after step {whole.steps} of 40" in (tmp_path / "whole" / "events.jsonl").read_text()
    assert whole.best_step is not None
    assert whole.steps == whole.best_step + 8 < 40
    full = veneer.train(make("full", train=RISES, adapter=LARGE | {"lora_dropout": 0.1}))
    assert full.best_step == whole.best_step
    planned = rates(tmp_path / "full")
    assert rates(tmp_path / "whole") == planned[: whole.steps], "the schedule is that of all steps"

    # Stopped after the best step, so that what is waited for has to come back.
    with pytest.raises(Interrupted):
        veneer.train(make("cut", **settings), listeners=[StopAt(whole.best_step + 5)])
    assert whole.best_step in steps_of(tmp_path / "cut")
    cut = veneer.train(make("cut", **settings), resume=True)
    assert (cut.steps, cut.best_step, cut.best_value) == (whole.steps, whole.best_step, whole.best_value)
    assert measured(tmp_path / "cut") == measured(tmp_path / "whole")
    assert same(tmp_path / "cut" / "adapter", tmp_path / "whole" / "adapter")
    assert steps_of(tmp_path / "cut") == [whole.best_step, whole.steps]


def test_a_run_that_ended_early_and_then_failed_is_finished_without_a_step(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("run", train=RISES | {"early_stopping": {"patience": 1, "min_delta": 50}})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("veneer.training.job.save_adapter", lambda *given: (_ for _ in ()).throw(OSError("full")))
        veneer.train(run)
    assert steps_of(tmp_path / "run") == [4]
    trained = veneer.train(run, resume="auto")
    assert (trained.steps, trained.kept_step) == (4, 4)
    assert veneer.train(run, resume="auto").steps == 4


def test_a_best_checkpoint_that_is_gone_is_missed_at_once(make: Make, tmp_path: Path) -> None:
    run = make("run", train=RISES | {"keep": "best", "save_total_limit": 2})
    with pytest.raises(Interrupted):
        veneer.train(run, listeners=[StopAt(33)])
    best = evaluations(tmp_path / "run")[-1]["best_step"]
    path = RunFolder(tmp_path / "run").checkpoints / f"step-{best:06d}"
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{path.name}: is gone, and train.keep=best would deliver it"):
        veneer.train(run, resume=True)
    assert not (tmp_path / "run" / "adapter").exists()


def seen(best: BestStep, values: list[float | None]) -> BestStep:
    for step, value in enumerate(values, 1):
        best.see({"step": step, best.metric: value})
    return best


def test_the_best_step_and_patience() -> None:
    loss = EarlyStopping(patience=2, min_delta=0.1)
    found = seen(BestStep(loss), [3.0, 2.0, 1.97, 1.95])
    assert (found.step, found.value, found.waited, found.is_over) == (4, 1.95, 2, True), "best, though not improved"
    assert not seen(BestStep(loss), [3.0, 2.0, 1.95, 1.85]).is_over, "small gains add up"
    assert seen(BestStep(loss), [3.0, None, math.nan]).is_over
    assert seen(BestStep(loss), [math.inf, None]).step is None
    score = EarlyStopping(metric="exact_match", patience=2)
    found = seen(BestStep(score, "higher"), [0.1, 0.5, 0.5, 0.4])
    assert (found.step, found.is_over) == (2, True), "of equal ones the first"
    assert not seen(BestStep(EarlyStopping(patience=None)), [1.0] * 99).is_over
    assert not seen(BestStep(), [1.0] * 99).is_over


def test_a_metric_whose_results_have_other_names_is_followed_by_the_one_that_decides(
    make: Make, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    answers = [row | {"completion": json.dumps({"animal": row["completion"]})} for row in rows]
    held_out = write_rows(tmp_path / "json.jsonl", answers)
    stop = {"early_stopping": {"metric": "json_fields", "patience": 2}, "eval_steps": 1}
    during = {"during": ["json_fields", "length"], "max_new_tokens": 24}
    trained = veneer.train(make("run", data={"validation": held_out}, train=stop, evaluate=during))
    found = evaluations(tmp_path / "run")
    assert [record["json_fields"] for record in found] == [record["record"] for record in found]
    assert (trained.best_step, trained.steps) == (1, 3), "no answer is right, and of equal values the first is the best"
    stop = {"early_stopping": {"metric": "length"}, "eval_steps": 1}
    with pytest.raises(UserError, match="length: it describes answers"):
        veneer.train(make("other", train=stop, evaluate={"during": ["length"]}))


ASKS: dict[str, Any] = {"keep": "best"}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"evaluate": {"during": ["exact_mach"]}}, r"`exact_mach` is no metric .*\n.*did you mean `exact_match`\?"),
        ({"evaluate": {"during": ["sparkle"]}}, r"`sparkle` is no metric .*\n.*name some of .*exact_match"),
        ({"evaluate": {"during": ["json_fields"]}}, "json_fields"),
        (
            {"train": {"early_stopping": {"metric": "exact_match"}}},
            r"the metric `exact_match` is not measured .*\(measured: loss, perplexity\)\n.*add it to evaluate.during",
        ),
        ({"train": ASKS, "data": {"validation": 0}}, r"train.keep=best: .* holds none out .*\n.*leave train.keep out"),
        ({"train": {"early_stopping": {}}, "data": {"validation": 0}}, "train.early_stopping: .* holds none out"),
        ({"evaluate": {"during": ["exact_match"]}, "data": {"validation": 0}}, "evaluate.during: .* holds none out"),
        ({"train": ASKS | {"eval_steps": None}}, "train.keep=best: with train.eval_steps = null nothing is measured"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(
    sections: dict[str, Any], expected: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "load_model", lambda *given: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=expected):
        veneer.train(make("run", **sections))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "train.early_stopping={patience: 0}",
            "train.early_stopping.patience = 0; fix: write {metric: loss, patience: 3",
        ),
        ("train.early_stopping={patient: 2}", "unknown key `train.early_stopping.patient`; write {metric: loss"),
        ("train.early_stopping=3", "train.early_stopping = 3"),
        ("train.keep=first", "train.keep = 'first': should be 'best' or 'last'"),
        ("evaluate.during=7", "evaluate.during = 7"),
    ],
)
def test_values_out_of_range_are_refused(
    override: str, expected: str, run_file: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, error = call("train", str(run_file), override)
    assert status == 2
    assert expected in error


def test_the_command_ends_early_with_status_0(run_file: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    settings = ("train.early_stopping={patience: 1, min_delta: 9}", "train.eval_steps=1", "train.keep=best")
    status, out, error = call("train", str(run_file), *settings, "evaluate.during=[exact_match]")
    assert status == 0
    assert "training ends early, after step 2 of 6: 1 evaluation without a better loss, best after step 2 (" in error
    assert "exact_match 0" in out
    assert "kept     that of the last step, 2; the best value was" in out
    status, out, _ = call("train", str(run_file), *settings, "--resume-auto", "--json")
    assert (status, json.loads(out)["steps"], json.loads(out)["best_step"]) == (0, 2, 2)


def test_a_setting_that_comes_too_seldom_to_act_is_told(make: Make) -> None:
    with notified("train.keep has no effect: held-out rows are evaluated every 100 steps"):
        load_job(make("run", train={"keep": "best"}))
