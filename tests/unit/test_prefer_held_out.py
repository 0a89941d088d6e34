"""What is told of a run on pairs: intervals on held-out pairs, the best step by them, and warnings."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import veneer
from tests.support.runs import StopAt, tiny_run, write_rows
from tests.unit.test_prefer import records, some_pairs
from veneer.config import Interrupted, UserError
from veneer.engine.objective import TrainedTokens
from veneer.training.bootstrap import GroupedRows, bootstrap
from veneer.training.intervals import proportion
from veneer.training.objectives import DirectPreference
from veneer.training.pair_values import describe_pairs, is_shown_above, outputs_of_rows, rank_correlation


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
    train = {"max_steps": 6, "eval_steps": 1, "keep": "best", "save_steps": 2, "learning_rate": 1e-2}
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
    train = {"max_steps": 12, "eval_steps": 1, "learning_rate": 1e-9}
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
