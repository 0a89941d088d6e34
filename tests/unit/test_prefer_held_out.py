"""What is told of a run on pairs: intervals on held-out pairs, the best step by them, and warnings."""

import json
import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import veneer
from tests.support.notices import notified
from tests.support.runs import StopAt, some_pairs, tiny_run, write_rows
from tests.unit.test_prefer import records
from veneer.cli.progress import LiveProgress
from veneer.cli.show_plan import show_plan
from veneer.config import Interrupted, RunFolder, UserError
from veneer.config.notify import collected
from veneer.data.pipeline import prepare
from veneer.data.render import Renderer
from veneer.engine.objective import TrainedTokens
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate
from veneer.report.run_page import run_page
from veneer.training.bootstrap import GroupedRows, bootstrap
from veneer.training.intervals import proportion
from veneer.training.objectives import DirectPreference
from veneer.training.pair_values import describe_pairs, is_shown_above, outputs_of_rows, rank_correlation
from veneer.training.preference_watch import PreferenceWatch


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", some_pairs(24))


def some_tokens(pairs: int, padding: int = 0) -> TrainedTokens:
    """Tokens of pairs of uneven length, of which the last has an empty answer."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + n % 4 for n in range(2 * pairs)]
    bounds = torch.tensor([0, *np.cumsum(lengths).tolist()])
    total = int(bounds[-1])
    is_trained = torch.arange(total) >= 0
    is_trained[bounds[:-1]] = False
    is_trained[bounds[-2] :] = False
    index = is_trained.nonzero().squeeze(1)
    reference = torch.zeros(total)
    firsts = torch.tensor([int(start) + 1 for start in bounds[:-1]])
    reference[firsts] = -2 - torch.rand(2 * pairs, generator=generator)
    logprobs = -torch.rand(len(index) + padding, generator=generator, dtype=torch.float64)
    weights = torch.cat([torch.ones(len(index)), torch.zeros(padding)])
    index = torch.cat([index, torch.zeros(padding, dtype=torch.int64)])
    return TrainedTokens(logprobs, weights, index, bounds, {"reference": reference[index] * weights})


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_pairs_one_by_one_add_up_to_their_batch(loss_type: str) -> None:
    objective = DirectPreference(0.3, loss_type)
    whole, one_by_one = objective(some_tokens(9, 2))[0], list(outputs_of_rows(objective, some_tokens(9, 2)))
    assert len(one_by_one) == 9
    assert [one.weight.item() for one in one_by_one] == [1] * 8 + [0]
    torch.testing.assert_close(torch.stack([one.loss for one in one_by_one]).sum(), whole.loss)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(torch.stack([one.metrics[name] for one in one_by_one]).sum(), value)


def test_intervals_are_those_of_evaluation_over_pairs() -> None:
    outputs = list(outputs_of_rows(DirectPreference(1.0), some_tokens(12)))
    told = describe_pairs(outputs)
    margins = np.array([one.metrics["rewards/margins"].item() for one in outputs[:-1]])
    wanted = bootstrap(GroupedRows.of(margins))[0]
    assert told["intervals"]["rewards/margins"] == [wanted.low, wanted.high]
    right = proportion(int((margins > 0).sum()), 11)
    assert told["intervals"]["rewards/accuracies"] == [right.low, right.high]
    assert set(told["intervals"]) == {*outputs[0].metrics, "loss"} - {"lengths/difference"}


def test_a_rank_correlation_is_spearmans() -> None:
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 8, 27])) == pytest.approx(1)
    # By hand, from Pearson's formula on the ranks (1, 2, 3, 4) and, with a tie, (1, 3.5, 2, 3.5).
    assert rank_correlation(np.array([1.0, 2, 3, 4]), np.array([0.0, 9, 5, 9])) == pytest.approx(3 / math.sqrt(22.5))
    assert rank_correlation(np.array([1.0, 2, 3]), np.ones(3)) is None
    assert is_shown_above(0.9, 0.5, 40)
    assert not is_shown_above(0.9, 0.5, 5)
    assert not is_shown_above(0.6, 0.5, 40)


def test_a_held_out_record_has_intervals_around_its_means(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str
) -> None:
    data = {"validation": 8, "duplicates": "keep"}
    for rows in (1, 8):  # at a time
        evaluate = {"batch_size": rows}
        veneer.train(tiny_run(tiny_model(), pairs_file, tmp_path / str(rows), data=data, evaluate=evaluate))
    one, eight = (records(tmp_path / str(rows), "eval")[-1] for rows in (1, 8))
    for name, (low, high) in eight["intervals"].items():
        assert low <= eight[name] <= high
        assert (low, high) == pytest.approx(one["intervals"][name], abs=1e-4)
    low, high = eight["intervals"]["rewards/margins"]
    assert low < high
    assert -1 <= eight["lengths/correlation"] <= 1


@pytest.mark.parametrize("metric", ["rewards/margins", "rewards/rejected"])
def test_the_best_step_is_found_by_a_metric_of_pairs_in_its_own_direction(
    metric: str, tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str
) -> None:
    train: dict[str, Any] = {"max_steps": 6, "eval_steps": 1, "keep": "best", "save_steps": 2, "learning_rate": 1e-2}
    train |= {"early_stopping": {"metric": metric, "patience": None}}
    data = {"validation": 8, "duplicates": "keep"}
    runs = [tiny_run(tiny_model(), pairs_file, tmp_path / name, train=train, data=data) for name in ("whole", "cut")]
    trained = veneer.train(runs[0])
    found = {record["step"]: record[metric] for record in records(tmp_path / "whole", "eval")}
    best = max(found.values()) if metric == "rewards/margins" else min(found.values())
    assert trained.best_value == best
    assert found[trained.kept_step or 0] == best
    with pytest.raises(Interrupted):
        veneer.train(runs[1], listeners=[StopAt(4)])
    resumed = veneer.train(runs[1], resume=True)
    assert (resumed.best_step, resumed.best_value) == (trained.best_step, trained.best_value)


def test_training_ends_early_by_accuracy(tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str) -> None:
    train: dict[str, Any] = {"max_steps": 12, "eval_steps": 1, "learning_rate": 1e-9}
    train |= {"early_stopping": {"metric": "rewards/accuracies", "patience": 2}}
    run = tiny_run(tiny_model(), pairs_file, tmp_path / "run", train=train, data={"validation": 8})
    assert veneer.train(run).steps < 12


def test_metrics_of_answers_are_measured_beside_those_of_pairs(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str
) -> None:
    sections: dict[str, Any] = {"evaluate": {"during": ["exact_match", "rewards/accuracies"], "max_new_tokens": 4}}
    sections["train"] = {"early_stopping": {"metric": "rewards/accuracies"}, "eval_steps": 2}
    veneer.train(tiny_run(tiny_model(), pairs_file, tmp_path / "run", data={"validation": 8}, **sections))
    last = records(tmp_path / "run", "eval")[-1]
    assert {"exact_match", "rewards/accuracies"} <= set(last)


def test_a_metric_that_pairs_do_not_have_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str
) -> None:
    train = {"early_stopping": {"metric": "perplexity"}}
    run = tiny_run(tiny_model(), pairs_file, tmp_path / "run", train=train, data={"validation": 8})
    with pytest.raises(UserError, match="measured: loss, rewards/chosen, rewards/rejected, rewards/margins"):
        veneer.train(run)


def a_step(step: int, logps: float, chosen: float, kind: str = "train", **more: Any) -> dict[str, Any]:
    record = {"kind": kind, "step": step, "logps/chosen": logps, "rewards/chosen": chosen, "rewards/margins": 1.0}
    return record | more


def test_chosen_answers_that_fall_are_told_once() -> None:
    """A reward of -0.5 by beta 0.1 is a log-ratio of -5: the reference had -15, and now it is -20."""
    with notified("chosen answers lose probability") as told:
        watch = PreferenceWatch(0.1, 40)
        for step in range(1, 31):
            watch(a_step(step, -20, -0.5))
    (message,) = [message for message in told if "lose probability" in message]
    assert "step 10: " in message
    assert "is -20.0 on the pairs of the last 10 steps, 5.0 below that of the reference (-15.0)" in message
    assert "lower train.learning_rate, raise beta" in message


def test_what_is_no_fall_is_not_told() -> None:
    with collected() as notices:
        watch = PreferenceWatch(0.1, 40)
        for step in range(1, 31):
            watch(a_step(step, -20, -0.1))  # 1 of 19, below a tenth
        watch(a_step(30, -20, -0.5, "eval", intervals={"rewards/chosen": [-1.2, 0.1]}))  # chance
        watch(a_step(30, -20, -0.5, "eval", **{"intervals": {}, "lengths/correlation": 0.4}))
    assert not notices.events


def test_a_fall_on_held_out_pairs_is_told_without_a_reference_too() -> None:
    with notified("3.0 below that of the first evaluation"):
        watch = PreferenceWatch(None, 40)
        for step, logps in ((10, -20), (20, -21), (30, -23)):
            watch(a_step(step, logps, -2, "eval"))


def test_margins_that_follow_lengths_are_told_and_what_was_told_is_not_told_again() -> None:
    record = a_step(20, -10, 0.1, "eval", **{"intervals": {}, "lengths/correlation": 0.9})
    with notified("margins on held-out pairs follow the lengths"):
        PreferenceWatch(0.1, 40)(record)
    with collected() as notices:
        resumed = PreferenceWatch(0.1, 40)
        resumed.recall([record])
        resumed(record)
        PreferenceWatch(0.1, 6)(record)  # too few pairs to show it
    assert not notices.events


def test_a_run_that_drives_chosen_answers_down_says_so_in_its_events(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str
) -> None:
    """It starts from an adapter that knows them nearly by heart."""
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in some_pairs(24)]
    file, train = write_rows(tmp_path / "rows.jsonl", rows), {"learning_rate": 3e-2, "max_steps": 40}
    veneer.train(tiny_run(tiny_model(), file, tmp_path / "start", train=train))
    sections: dict[str, Any] = {
        "model": {"adapter": str(tmp_path / "start")},
        "train": {"learning_rate": 0.3, "max_steps": 15},
    }
    with notified("chosen answers lose probability"):
        veneer.train(tiny_run(tiny_model(), pairs_file, tmp_path / "run", data={"validation": 8}, **sections))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["level"] for event in events if "chosen answers lose probability" in event["message"]] == ["warning"]


SAME = {"prompt": "what", "chosen": "cat", "rejected": "cat"}
OTHER = {
    "chosen": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "cat"}],
    "rejected": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "dog"}],
}


def test_equal_answers_and_different_prompts_are_bad_rows_and_counted(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    system = {"role": "system", "content": "be kind"}
    with_system = {side: [system, *turns] for side, turns in OTHER.items()}
    long = {"prompt": "what", "chosen": "cat", "rejected": "owl " * 60}
    file = write_rows(tmp_path / "rows.jsonl", [*some_pairs(4), SAME, OTHER, with_system, long])
    data = {"bad_rows": "drop", "max_length": 64, "overlong": "drop"}
    run = tiny_run(tiny_model(), file, tmp_path / "run", data=data)
    ledger = prepare(run.data, Renderer(load_tokenizer(locate(run.model)), run.data), 0).ledger
    assert (ledger.rows["used"], ledger.rows["refused"], ledger.rows["overlong"]) == (4, 3, 1)
    assert (ledger.notes["same_answers"], ledger.notes["other_prompts"], ledger.notes["overlong_pairs"]) == (1, 2, 1)
    assert "1 row whose chosen and rejected answers are the same: left out" in ledger.warnings
    assert "2 rows whose chosen and rejected conversations have different prompts: left out" in ledger.warnings
    assert "1 row with an answer beyond data.max_length: the pair is left out whole" in ledger.warnings
    assert not any("cannot be right" in warning for warning in ledger.warnings)
    run = tiny_run(tiny_model(), file, tmp_path / "run", data=data | {"bad_rows": "refuse"})
    with pytest.raises(UserError, match=r"answer different prompts: they differ from turn 1 on \(user\)"):
        veneer.train(run)


def test_page_card_plan_and_log_say_what_pairs_showed(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str
) -> None:
    data = {"validation": 8, "duplicates": "keep"}
    run = tiny_run(tiny_model(), pairs_file, tmp_path / "run", data=data, train={"eval_steps": 2})
    console = Console(file=StringIO(), width=120)
    planned = veneer.plan(run)
    show_plan(console, run, planned.as_dict())
    with LiveProgress(console, 6) as progress:
        veneer.train(run, listeners=[progress])
    with RunFolder(tmp_path / "run").events.open("a") as file:
        file.write(json.dumps({"level": "warning", "message": "step 3: margins follow"}) + "\n")
    last = records(tmp_path / "run", "eval")[-1]
    low, high = last["intervals"]["rewards/margins"]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "pairs    16 to train on in 6 optimizer steps; each is two documents" in shown
    assert f"margin {last['rewards/margins']:.3g} ({low:.3g} to {high:.3g})" in shown
    assert "logps" not in shown
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "Learnt from 16 pairs of answers by dpo with beta 0.1, relative to the base." in card
    assert f"on 8 held-out pairs {last['rewards/margins']:.3g} (95% interval {low:.3g} to {high:.3g})." in card
    assert "6 steps of 4 pairs" in card
    page = run_page(tmp_path / "run")
    assert f"margin {last['rewards/margins']:.3g} ({low:.3g} to {high:.3g}), accuracy" in page
    for title in ("Margin of rewards", "Accuracy: share of the pairs", "Log-probability of an answer"):
        assert title in page
    assert page.count('"description":"held-out"') == 3, "of loss, margin and accuracy"
    assert "step 3: margins follow" in page
    assert "Mean over pairs" in page
