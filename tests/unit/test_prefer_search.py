"""A rate that is found for pairs of answers, and sweeps over them: both compare the loss of each held-out pair."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.runs import some_pairs, tiny_run, write_rows
from tests.unit.test_prefer import records
from veneer.config import UserError
from veneer.training import rate_search
from veneer.training.job import TrainingJob


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", some_pairs(24))


def test_a_rate_is_found_by_the_loss_of_held_out_pairs(
    tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_search, "PAIR_RATES", (1e-8, 1e-2))
    train: dict[str, Any] = {"learning_rate": "auto", "max_steps": 600, "eval_steps": None, "dpo": {"beta": 1.0}}
    data = {"validation": pairs_file, "duplicates": "keep"}
    job = TrainingJob(tiny_run(tiny_model(), pairs_file, tmp_path / "run", train=train, data=data))
    found = job.rate_search
    assert found is not None
    assert (found.rate, found.held_out_rows) == (1e-2, 24)
    low, good = found.tried
    assert low.loss == pytest.approx(math.log(2), abs=1e-4)
    assert low.loss is not None
    assert good.loss is not None
    assert good.loss < low.loss
    assert low.difference is not None
    assert low.difference.low > 0
    job.fit_until(1)
    assert records(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-9), "the adapter is put back"


def test_the_rates_of_pairs_are_those_of_preference_training() -> None:
    assert rate_search.PAIR_RATES == (5e-7, 1.6e-6, 5e-6, 1.6e-5, 5e-5)


def test_a_sweep_compares_trials_pair_by_pair(tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str) -> None:
    data = {"validation": 10, "duplicates": "keep"}
    run = tiny_run(tiny_model(), pairs_file, tmp_path / "run", data=data, train={"max_steps": 20})
    planned = {"run": json.loads(run.model_dump_json()), "grid": {"train.learning_rate": [1e-8, 1e-2]}}
    planned |= {"output_dir": str(tmp_path / "sweep"), "rungs": [2]}
    (tmp_path / "sweep.yaml").write_text(json.dumps(planned))
    result = veneer.sweep(tmp_path / "sweep.yaml").result
    assert result.rows == 10
    still, learnt = result.combinations
    assert result.best.combination.settings == {"train.learning_rate": 1e-2}
    assert still.loss is not None
    assert learnt.loss is not None
    assert still.loss.value == pytest.approx(math.log(2), abs=1e-4)
    assert learnt.loss.low < learnt.loss.value < still.loss.value
    trained = veneer.train(run.model_copy(update={"train": run.train.model_copy(update={"save_steps": None})}))
    assert records(Path(trained.run_dir), "eval")[-1]["loss"] == pytest.approx(learnt.loss.value, abs=1e-6)


@pytest.mark.parametrize("setting", ["train.dpo", "train.objective"])
def test_a_sweep_over_what_is_minimized_is_refused(
    setting: str, tiny_model: Callable[..., Path], tmp_path: Path, pairs_file: str
) -> None:
    grids: dict[str, list[Any]] = {"train.dpo": [{"beta": 0.1}, {"beta": 0.2}], "train.objective": ["auto", "dpo"]}
    run = tiny_run(tiny_model(), pairs_file, tmp_path / "run", data={"validation": 10})
    planned = {"run": json.loads(run.model_dump_json()), "grid": {setting: grids[setting]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(planned | {"output_dir": str(tmp_path / "sweep")}))
    with pytest.raises(UserError, match="would change the meaning of"):
        veneer.sweep(tmp_path / "sweep.yaml")
