"""A run goes on: longer, from an earlier checkpoint, as another run, elsewhere, and on another engine's state."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.support.runs import StopAt, losses, some_rows, tiny_run, write_rows
from veneer.config import Interrupted, RunFolder, UserError
from veneer.config.load import to_yaml
from veneer.config.notify import collected
from veneer.training.checkpoint import is_flat
from veneer.training.metrics import read_metrics
from veneer.training.optimizer import layout_of, split_state

Call = Callable[..., tuple[int, str, str]]
TRAIN = {"save_steps": 2, "save_total_limit": 9, "eval_steps": 2, "lr_scheduler_type": "constant", "warmup_ratio": 0}
SECTIONS: dict[str, Any] = {"data": {"validation": 2}, "adapter": {"lora_dropout": 0.2}}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", some_rows())


@pytest.fixture(scope="module")
def whole(tiny_model: Callable[..., Path], rows_file: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of six steps that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    veneer.train(tiny_run(tiny_model(), rows_file, folder, train=TRAIN, **SECTIONS))
    return RunFolder(folder)


@pytest.fixture(scope="module")
def short(tiny_model: Callable[..., Path], rows_file: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run with three steps, finished."""
    folder = tmp_path_factory.mktemp("short") / "run"
    veneer.train(tiny_run(tiny_model(), rows_file, folder, train=TRAIN | {"max_steps": 3}, **SECTIONS))
    return RunFolder(folder)


@pytest.fixture
def moved(whole: RunFolder, short: RunFolder, tmp_path: Path) -> Callable[[str], RunFolder]:
    """Copies a finished run to a folder of its own."""

    def move(which: str) -> RunFolder:
        shutil.copytree((whole if which == "whole" else short).path, tmp_path / which)
        return RunFolder(tmp_path / which)

    return move


def adapter(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


def settings(folder: RunFolder, *overrides: str) -> veneer.Run:
    return veneer.load_run(folder.run, [f"train.output_dir={folder.path}", *overrides])


def told(run: veneer.Run, **how: Any) -> str:
    with collected() as notices:
        before = len(notices.events)
        veneer.train(run, **how)
        return "\n".join(event["message"] for event in notices.events[before:])


def test_a_finished_run_is_extended_and_is_the_run_that_had_all_steps(
    moved: Callable[[str], RunFolder], whole: RunFolder, call: Call
) -> None:
    folder = moved("short")
    before, longer = adapter(folder), settings(folder, "train.max_steps=6")
    with pytest.raises(Interrupted):
        veneer.train(longer, extend=True, listeners=[StopAt(5)])
    assert adapter(folder) == before, "what was delivered stays until the new one takes its place"
    assert veneer.runs(folder.path).runs[0].state == "interrupted"
    assert call("train", str(folder.path), "--resume", "auto")[0] == 0
    assert adapter(folder) == adapter(whole)
    assert losses(folder.path) == losses(whole.path)
    assert veneer.runs(folder.path).runs[0].state == "finished"
    expected = [{"after_step": 3, "planned_before": 3, "planned": 6}]
    assert json.loads(folder.lineage.read_text())["extended"] == expected
    assert json.loads((folder.adapter / "passport.json").read_text())["lineage"]["extended"] == expected
    status, out, _ = call("train", str(folder.path), "--extend")
    assert status == 0
    assert "finished already" in out
    assert "raise train.max_steps" in out


def test_an_extension_says_what_becomes_of_the_learning_rate(
    tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path
) -> None:
    train = TRAIN | {"lr_scheduler_type": "cosine", "max_steps": 3, "keep": "best"}
    run = tiny_run(tiny_model(), rows_file, tmp_path / "run", train=train, **SECTIONS)
    veneer.train(run)
    best = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    said = told(veneer.load_run(tmp_path / "run" / "run.yaml", ["train.max_steps=6"]), extend=True)
    assert "from 3 to 6 steps and goes on after step 3: from here the learning rate follows the cosine schedule" in said
    assert "the next step has 0.005, where the schedule of 3 steps had come to 0.0025" in said
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert best == next(one for one in records if (one["kind"], one["step"]) == ("eval", 3)), "it chose the best"
    assert next(one["learning_rate"] for one in records if one["step"] == 4) == pytest.approx(0.005)


def test_an_extension_that_is_none_is_refused(moved: Callable[[str], RunFolder], tmp_path: Path) -> None:
    folder = moved("short")
    content = {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="was to have 3 steps, and is asked for 2"):
        veneer.train(settings(folder, "train.max_steps=2"), extend=True)
    with pytest.raises(UserError, match=r"train\.learning_rate: was 0\.01, is 0\.5") as refused:
        veneer.train(settings(folder, "train.max_steps=6", "train.learning_rate=0.5"), extend=True)
    assert "max_steps" not in str(refused.value)
    with pytest.raises(UserError, match=r"max_steps: was 3, is 6\n  fix: --extend makes the run longer"):
        veneer.train(settings(folder, "train.max_steps=6"), resume=True)
    with pytest.raises(UserError, match="holds no run"):
        veneer.train(settings(folder, f"train.output_dir={tmp_path / 'none'}"), extend=True)
    assert {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()} == content


def test_a_run_goes_back_to_a_named_checkpoint(moved: Callable[[str], RunFolder], whole: RunFolder, call: Call) -> None:
    folder = moved("whole")
    status, _, err = call("train", str(folder.path), "--resume", "step-000002")
    assert status == 0
    assert "goes back to step 2: step-000004, step-000006 and the records after it are dropped" in err
    assert adapter(folder) == adapter(whole)
    assert losses(folder.path) == losses(whole.path)
    assert losses(folder.path, "eval") == losses(whole.path, "eval")
    status, _, err = call("train", str(folder.path), "--resume=step-3")
    assert status == 2
    assert "no checkpoint of" in err
    assert "name one of step-000002, step-000004, step-000006" in err


def test_a_finished_run_that_is_resumed_says_so(moved: Callable[[str], RunFolder], call: Call) -> None:
    folder = moved("whole")
    before = folder.metrics.stat().st_mtime_ns
    for words in ([str(folder.path), "--resume"], [str(folder.run), "--resume", "auto"]):
        status, out, _ = call("train", *words)
        assert (status, "finished already" in out) == (0, True)
    assert folder.metrics.stat().st_mtime_ns == before


def test_a_fork_is_a_run_of_its_own(moved: Callable[[str], RunFolder], whole: RunFolder, call: Call) -> None:
    source, fork = moved("whole"), RunFolder(whole.path.with_name("fork"))
    content = {file: file.read_bytes() for file in source.path.rglob("*") if file.is_file()}
    at = source.checkpoints / "step-000004"
    with pytest.raises(UserError, match=r"model\.dtype: was float32, is bfloat16(.|\n)*model\.adapter="):
        veneer.train(settings(source, f"train.output_dir={fork.path}", "model.dtype=bfloat16"), fork=at)
    with pytest.raises(UserError, match="4 steps are done there, and the fork has 4"):
        veneer.train(settings(source, f"train.output_dir={fork.path}", "train.max_steps=4"), fork=at)
    with pytest.raises(UserError, match="that is the run that --fork names"):
        veneer.train(settings(source), fork=at, overwrite=True)
    assert not fork.path.exists()
    # What a fork leaves that was killed before it had begun.
    shutil.copytree(source.checkpoints, fork.checkpoints)
    shutil.copy(source.environment, fork.environment)
    fork.lineage.write_text('{"forked_from": {}, "extended": []}')
    assert call("train", "--fork", str(at), "-o", str(fork.path))[0] == 0
    assert adapter(fork) == adapter(whole), "with the same settings it is the same run"
    assert [path.name for path in sorted(fork.checkpoints.iterdir())] == ["step-000004", "step-000006"]
    assert [record["step"] for record in read_metrics(fork.metrics)] == [4, 5, 6, 6]
    origin = json.loads((fork.adapter / "passport.json").read_text())["lineage"]["forked_from"]
    assert (origin["run"], origin["step"], origin["changed"]) == ("whole", 4, [])
    assert {file: file.read_bytes() for file in source.path.rglob("*") if file.is_file()} == content
    shutil.rmtree(fork.path)
    other = settings(source, f"train.output_dir={fork.path}", "train.learning_rate=0.5", "train.max_steps=8")
    assert veneer.train(other, fork=source.path).steps == 8
    changed = json.loads(fork.lineage.read_text())["forked_from"]["changed"]
    assert changed == ["train.learning_rate: was 0.01, is 0.5", "train.max_steps: was 6, is 8"]


def test_what_cannot_be_promised_to_the_bit_is_told(
    tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path
) -> None:
    run = tiny_run(tiny_model(), rows_file, tmp_path / "run", train=TRAIN)
    with pytest.raises(Interrupted):
        veneer.train(run, listeners=[StopAt(3)])
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["optim"] == "adamw_torch"
    plan |= {"engine": "fused", "machine": plan["machine"] | {"device": "cuda"}}
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    cut = run.train.model_copy(update={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    said = told(run.model_copy(update={"train": cut}), resume=True)
    assert (
        "goes on with another device cpu (began with cuda), another engine reference (began with fused), another "
        "micro-batches 2 x 2 (began with 4 x 1): the rows of each step and the state are the same" in said
    )
    assert "not bit for bit" in said


def test_the_state_of_a_flat_adapter_is_that_of_its_matrices(whole: RunFolder) -> None:
    """Two matrices in one buffer, updated as one, go on as two, as on an engine without such a buffer."""
    flat = torch.nn.Parameter(torch.randn(5 * 512))
    model = torch.nn.Module()
    model.b = torch.nn.Parameter(flat.data[512:].view(4, 512))
    model.a = torch.nn.Parameter(flat.data[:512].view(2, 256))
    layout = layout_of(model, flat)
    assert layout == [("a", 512), ("b", 2048)]
    state = {
        "master/step": torch.tensor(3.0),
        "master/exp_avg": torch.arange(2560.0),
        "master/state1": torch.arange(2560).to(torch.uint8),
        "master/absmax1": torch.arange(10.0),
        "master/qmap1": torch.arange(256.0),
    }
    split = split_state(state, layout, dict(model.named_parameters()))
    assert split["b/step"] == 3.0
    assert torch.equal(split["a/exp_avg"], torch.arange(512.0).view(2, 256))
    assert torch.equal(split["b/exp_avg"], torch.arange(512.0, 2560.0).view(4, 512))
    assert split["b/state1"].dtype == torch.uint8
    assert torch.equal(split["a/absmax1"], torch.arange(2.0))
    assert torch.equal(split["b/absmax1"], torch.arange(2.0, 10.0))
    assert torch.equal(split["b/qmap1"], torch.arange(256.0))
    assert not is_flat(whole.checkpoints / "step-000004")


def test_a_stop_while_loading_says_how_to_start_again(
    tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(tiny_run(tiny_model(), rows_file, tmp_path / "run", train=TRAIN)))
    with monkeypatch.context() as patch:
        patch.setattr("veneer.training.job.load_parts", stop)
        status, _, err = call("train", str(file))
        assert status == 130
        assert "stopped: no checkpoint was written yet\n  start again with: " in err
        assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr("veneer.training.job.save_adapter", stop)
        status, _, err = call("train", str(file))
        assert status == 130
        assert "step-000006 is where --resume goes on\n  go on with: " in err
        assert f" train {tmp_path / 'run'} --resume\n" in err
    assert call("train", str(tmp_path / "run"), "--resume")[0] == 0
