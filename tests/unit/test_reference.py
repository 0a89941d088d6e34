"""`train.reference`: computed once and kept on disk, at each step, or none."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.support.notices import notified
from tests.support.runs import StopAt, losses, some_pairs, tiny_run, write_rows
from veneer.config import Interrupted, RunFolder, UserError
from veneer.training.job import TrainingJob
from veneer.training.metrics import read_metrics

TIMES = ("time", "seconds", "tokens_per_second", "peak_bytes")
MakeRun = Callable[..., veneer.Run]


@pytest.fixture(scope="module")
def start(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in some_pairs()]
    run = tiny_run(tiny_model(), write_rows(folder / "rows.jsonl", rows), folder / "run", train={"learning_rate": 3e-2})
    veneer.train(run)
    return folder / "run"


@pytest.fixture
def make_run(tiny_model: Callable[..., Path], tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """A run of four steps, which are one epoch, with a cache of the test's own."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    pairs = write_rows(tmp_path / "pairs.jsonl", some_pairs())

    def make(name: str, model: dict[str, Any] | None = None, **train: Any) -> veneer.Run:
        train = {"max_steps": 4, "per_device_train_batch_size": 2, "eval_steps": 2, "warmup_ratio": 0} | train
        sections = {"data": {"validation": pairs, "duplicates": "keep"}, "model": {"adapter": str(start)}}
        return tiny_run(
            tiny_model(), pairs, tmp_path / name, train=train, **sections | {"model": model or sections["model"]}
        )

    return make


def records(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(RunFolder(folder).metrics)
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same adapter to the last bit."""
    wanted = adapter(other)
    return all(torch.equal(value, wanted[name]) for name, value in adapter(one).items())


def was_kept(run: Path) -> bool:
    """Whether a run says that it has read its reference from the cache."""
    return "are those of an earlier run, kept in" in (run / "events.jsonl").read_text()


def entries(tmp_path: Path) -> set[Path]:
    return {path for path in (tmp_path / "cache" / "reference").glob("*") if path.is_dir()}


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_live_equals_cached_to_the_last_bit(engine: str, make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("cached", "live"):
        veneer.train(make_run(name, engine=engine, reference=name))
    assert records(tmp_path / "live") == records(tmp_path / "cached")
    assert same(tmp_path / "live", tmp_path / "cached")
    first, *_, last = losses(tmp_path / "live")
    assert first == math.log(2)
    assert abs(last - first) > 0.01, "the adapter has left its reference"


def test_a_second_run_reads_what_the_first_has_computed(make_run: MakeRun, tmp_path: Path) -> None:
    veneer.train(make_run("one"))
    (entry,) = entries(tmp_path)
    veneer.train(make_run("two"))
    assert was_kept(tmp_path / "two")
    assert not was_kept(tmp_path / "one")
    assert same(tmp_path / "one", tmp_path / "two")
    assert records(tmp_path / "one") == records(tmp_path / "two")
    assert entries(tmp_path) == {entry}


@pytest.mark.parametrize("damage", ["bytes", "foreign", "no manifest"])
def test_a_damaged_or_foreign_entry_is_computed_again(damage: str, make_run: MakeRun, tmp_path: Path) -> None:
    veneer.train(make_run("one"))
    (entry,) = entries(tmp_path)
    if damage == "bytes":
        file = entry / "sums.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 64
        file.write_bytes(content)
    elif damage == "foreign":
        veneer.train(make_run("base", model={"adapter": None}))
        (other,) = entries(tmp_path) - {entry}
        shutil.rmtree(entry)
        shutil.copytree(other, entry)
    else:
        (entry / "manifest.json").unlink()
    with notified("damaged, or of another run; the reference is computed again"):
        veneer.train(make_run("two"))
    assert records(tmp_path / "one") == records(tmp_path / "two")
    veneer.train(make_run("three"))
    assert was_kept(tmp_path / "three")


def test_whatever_the_numbers_depend_on_has_an_entry_of_its_own(make_run: MakeRun, tmp_path: Path, start: Path) -> None:
    runs: list[dict[str, Any]] = [
        {},
        {"engine": "fused"},
        {"per_device_train_batch_size": 4},
        {"max_steps": 1},
        {"seed": 7},
        {"model": {"adapter": None}},
        {"model": {"adapter": str(start), "dtype": "bfloat16"}},
    ]
    for number, settings in enumerate(runs):
        run = make_run(str(number), **settings)
        TrainingJob(run)._reference.give()
        assert len(entries(tmp_path)) == number + 1, settings
    TrainingJob(make_run("again", learning_rate=1e-3, dpo={"beta": 0.5}))._reference.give()
    assert len(entries(tmp_path)) == len(runs), "neither rate nor beta changes the reference"


@pytest.mark.parametrize("reference", ["cached", "live", "none"])
def test_a_resumed_run_is_the_whole_run(reference: str, make_run: MakeRun, tmp_path: Path) -> None:
    """Over two epochs, stopped in the first and in the second, with an entry that is gone when it is resumed."""
    settings = {"reference": reference, "max_steps": 8, "save_steps": 1}
    veneer.train(make_run("whole", **settings))
    for step in (2, 6):
        with pytest.raises(Interrupted):
            veneer.train(make_run("cut", **settings), resume="auto", listeners=[StopAt(step)])
        shutil.rmtree(tmp_path / "cache" / "reference", ignore_errors=True)
    veneer.train(make_run("cut", **settings), resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert losses(tmp_path / "whole", "eval") == losses(tmp_path / "cut", "eval")


def test_without_a_reference_the_loss_is_that_of_plain_log_probabilities(make_run: MakeRun, tmp_path: Path) -> None:
    veneer.train(make_run("run", reference="none", per_device_train_batch_size=1, dpo={"beta": 0.3}))
    for record in records(tmp_path / "run"):
        if record["kind"] == "train":
            margin = 0.3 * (record["logps/chosen"] - record["logps/rejected"])
            assert record["rewards/margins"] == pytest.approx(margin, abs=1e-5)
            assert record["loss"] == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-5)
    assert not entries(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "none", "dpo": {"loss_type": "ipo"}}, "dpo with loss_type sigmoid or hinge goes without"),
        ({"reference": "never"}, "train.reference"),
    ],
)
def test_a_reference_that_the_loss_needs_is_not_left_out(
    settings: dict[str, Any], message: str, make_run: MakeRun
) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        TrainingJob(make_run("run", **settings))


@pytest.mark.parametrize("reference", ["live", "none"])
def test_supervised_training_has_no_reference(
    reference: str, tiny_model: Callable[..., Path], tmp_path: Path, start: Path
) -> None:
    run = tiny_run(tiny_model(), str(start.parent / "rows.jsonl"), tmp_path / "run", train={"reference": reference})
    with pytest.raises(UserError, match="the objective sft compares with no reference"):
        TrainingJob(run)
