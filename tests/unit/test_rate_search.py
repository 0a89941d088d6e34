"""`train.learning_rate: auto` on a tiny model: what it finds, what it keeps, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.runs import some_rows, tiny_run, write_rows
from veneer.config import JobError, UserError
from veneer.training import job as job_module
from veneer.training import rate_search
from veneer.training.job import TrainingJob
from veneer.training.paired_losses import RowLosses

Make = Callable[..., veneer.Run]


@pytest.fixture
def make(tiny_model: Callable[..., Path], tmp_path: Path) -> Make:
    """Makes a run of 260 steps that asks for a rate."""
    rows = [row | {"prompt": f"{n} {row['prompt']}"} for n, row in enumerate(some_rows() * 2)]
    file = write_rows(tmp_path / "rows.jsonl", rows)

    def made(folder: str = "run", validation: int = 10, adapter: Any = None, **train: Any) -> veneer.Run:
        settings = {"learning_rate": "auto", "max_steps": 260, "eval_steps": None, "save_steps": None} | train
        sections = {} if adapter is None else {"adapter": adapter}
        data = {"validation": validation}
        return tiny_run(tiny_model(), file, tmp_path / folder, data=data, train=settings, **sections)

    return made


def test_a_good_rate_is_found_among_bad_ones(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-8 changes nothing in a few steps and 1 spoils the adapter; 1e-2 is the rate of all tiny runs here."""
    monkeypatch.setattr(rate_search, "RATES", (1e-8, 1e-2, 1.0))
    found = TrainingJob(make()).rate_search
    assert found is not None
    assert found.rate == 1e-2
    low, good, high = found.tried
    assert good.loss is not None
    assert low.loss is not None
    assert good.loss < 0.97 * low.loss
    assert low.difference is not None
    assert low.difference.low > 0, "the difference is shown on the held-out rows"
    assert high.loss is None or high.loss > good.loss


def test_it_costs_little_is_deterministic_and_leaves_the_adapter_alone(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = TrainingJob(make())
    assert job.rate_search is not None
    assert [one.rate for one in job.rate_search.tried] == [2e-5, 6.3e-5, 2e-4, 6.3e-4, 2e-3]
    assert job.rate_search.steps >= 4
    assert 0.05 < job.rate_search.share_of_run <= 0.15
    assert job.rate_search == TrainingJob(make("again")).rate_search
    line = next(line for line in capsys.readouterr().err.splitlines() if "train.learning_rate = auto" in line)
    assert f"auto: {job.rate_search.rate:g}, by the loss on" in line
    job.fit_until(3)
    TrainingJob(make("named", learning_rate=job.rate_search.rate)).fit_until(3)
    one, other = (
        (tmp_path / name / "checkpoints" / "step-000003" / "adapter_model.safetensors").read_bytes()
        for name in ("run", "named")
    )
    assert one == other


def test_methods_that_learn_at_other_rates_are_tried_at_those(make: Make) -> None:
    found = TrainingJob(make(adapter={"method": "vera", "lora_alpha": 32})).rate_search
    assert found is not None
    assert [one.rate for one in found.tried] == [2e-4, 6.3e-4, 2e-3, 6.3e-3, 2e-2]
    with pytest.raises(UserError, match=r"such as 0\.002"):
        TrainingJob(make(validation=0, adapter={"method": "ia3", "r": 16, "lora_alpha": 32}))


def test_the_rate_is_kept_with_the_run(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = TrainingJob(make())
    job.fit_until(2)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["learning_rate"]
    rate = job.run.train.learning_rate
    assert plan["rate"] == rate
    assert len(plan["tried"]) == 5
    assert veneer.load_run(tmp_path / "run" / "run.yaml").train.learning_rate == rate
    monkeypatch.setattr(job_module, "find_rate", lambda *given: pytest.fail("a resumed run knows its rate"))
    resumed = TrainingJob(make(), resume=True)
    assert (resumed.done, resumed.run.train.learning_rate) == (2, rate)


def test_what_says_nothing_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"held-out rows, of which there are 0; at least 8 are needed"):
        TrainingJob(make(validation=0))
    with pytest.raises(
        UserError, match=r"the run has 20 steps, too few for 15% of its cost.*it needs about \d+"
    ) as error:
        TrainingJob(make(max_steps=20))
    needed = int(str(error.value).partition("it needs about ")[2].split()[0])
    assert TrainingJob(make(max_steps=needed)).rate_search is not None
    monkeypatch.setattr(RowLosses, "mean", float("nan"))
    with pytest.raises(JobError, match=r"no rate from 2e-05 to 0\.002 trains"):
        TrainingJob(make())
    assert not (tmp_path / "run").exists()


def test_the_setting_is_a_rate_or_auto() -> None:
    for wrong in (0, 2, "fast"):
        with pytest.raises(UserError, match=rf"train\.learning_rate = '?{wrong}'?: should be"):
            veneer.Run(model={"base": "x"}, data={"train": "y"}, train={"learning_rate": wrong})
