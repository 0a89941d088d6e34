"""A run that is killed, stopped or disturbed loses nothing, and one command goes on with it."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import veneer
from tests.runs import losses, tiny_run, write_rows
from veneer import api
from veneer.cli.lasting import Lasting, polite_kills
from veneer.config import Interrupted, RunFolder, UserError, cache, load_run
from veneer.config.cache import cached
from veneer.data import tokenize
from veneer.release.card import licence
from veneer.model import Source
from veneer.report.run_page import run_page
from veneer.train import Listener, TrainingJob, finished
from veneer.train.metrics import MetricsFile, read_metrics

Call = Callable[..., tuple[int, str, str]]
EVALUATES: dict[str, Any] = {"data": {"validation": 2}, "train": {"eval_steps": 2, "save_steps": None}}


@pytest.fixture
def make(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> Callable[..., veneer.Run]:
    """Settings of a tiny run, in a folder by name."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return lambda name="run", **sections: tiny_run(tiny_model(), path, tmp_path / name, **sections)


@pytest.fixture
def folder(run_file: Path) -> RunFolder:
    """Of the run in `run_file`."""
    return RunFolder(load_run(run_file).train.output_dir)


class Hears(Listener):
    """Does something when a step has been logged."""

    def __init__(self, step: int, do: Callable[[], None], kind: str = "train") -> None:
        self._step, self._do, self._kind = step, do, kind

    def on_start(self, steps: int, done: int) -> None: ...

    def on_record(self, record: dict[str, Any]) -> None:
        if (record["step"], record["kind"]) == (self._step, self._kind):
            self._do()

    def on_end(self) -> None: ...


def fails() -> None:
    raise RuntimeError("killed")


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_one_command_starts_goes_on_and_says_that_it_is_finished(call: Call, run_file: Path, folder: RunFolder) -> None:
    status, out, err = call("train", str(run_file), "--resume", "auto", "--json")
    assert status == 0, err
    began, before = json.loads(out), weights(folder.path)
    status, out, _ = call("train", str(run_file), "--resume=auto", "--json")
    assert status == 0
    assert {key: json.loads(out)[key] for key in ("steps", "final_loss")} == {"steps": 6, "final_loss": began["final_loss"]}
    assert "finished already" in call("train", "--resume", "auto", str(run_file))[1]
    assert weights(folder.path) == before
    status, _, err = call("train", str(run_file), "train.learning_rate=0.5", "--resume", "auto")
    assert status == 2
    assert "train.learning_rate: was 0.01, is 0.5" in err
    assert call("train", str(run_file), "--resume", "auto", "--overwrite")[0] == 2
    assert call("train", str(run_file), "--resume")[0] == 2  # asked for what there is not


def test_a_folder_whose_run_never_began_is_free(make: Callable[..., veneer.Run]) -> None:
    whole = make("whole")
    veneer.train(whole)
    run = make()
    folder = RunFolder(run.train.output_dir)
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / ".step-000001.0123456789ab").mkdir()
    folder.checkpoints.joinpath(".step-000001.0123456789ab").rmdir()
    folder.checkpoints.rmdir()
    (folder.path / "environment.json").write_bytes(RunFolder(whole.train.output_dir).environment.read_bytes())
    for name in ("plan.json", "pii.jsonl", ".ledger.json.0123456789ab", ".lock"):
        (folder.path / name).touch()
    veneer.train(run, resume="auto")
    assert weights(folder.path) == weights(whole.train.output_dir)
    assert json.loads(folder.plan.read_text())["steps"] == 6
    assert not [path for path in folder.path.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"libraries": {"torch": "2"}}'])
def test_a_folder_of_another_program_is_not_free(content: str, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(UserError, match="is not empty"):
        RunFolder(tmp_path).require_free()


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_without_a_checkpoint_begins_anew(resume: Any, make: Callable[..., veneer.Run]) -> None:
    veneer.train(make("whole"))
    run = make()
    with pytest.raises(RuntimeError):
        TrainingJob(run).fit((Hears(2, fails),))
    assert finished(run) is None
    veneer.train(run, resume)
    assert weights(run.train.output_dir) == weights(make("whole").train.output_dir)
    assert losses(run.train.output_dir) == losses(make("whole").train.output_dir)


def test_what_a_killed_process_left_is_cleared(make: Callable[..., veneer.Run]) -> None:
    run = make(train={"save_steps": 1})
    with pytest.raises(RuntimeError):
        TrainingJob(run).fit((Hears(3, fails),))
    folder = RunFolder(run.train.output_dir)
    for name in (".adapter.0123456789ab", "checkpoints/.step-000003.0123456789ab"):
        (folder.path / name).mkdir()
        (folder.path / name / "half").touch()
    (folder.path / ".metrics.jsonl.0123456789ab").touch()
    veneer.train(run, resume=True)
    assert not [path for path in folder.path.rglob("*") if path.name.startswith(".")]


def test_a_second_process_is_refused(make: Callable[..., veneer.Run]) -> None:
    run = make(train={"save_steps": 1})
    second = TrainingJob(run)  # loaded before the first one began
    refused: list[str] = []

    def also() -> None:
        for start in (lambda: TrainingJob(run, resume=True), second.fit):
            with pytest.raises(UserError) as caught:
                start()
            refused.append(str(caught.value))

    TrainingJob(run).fit((Hears(3, also),))
    assert len(refused) == 2
    assert all("another process is training this run" in message for message in refused)
    assert len(losses(run.train.output_dir)) == 6
    assert not (run.train.output_dir / ".lock").exists()


@pytest.mark.parametrize("numbers", [["SIGTERM"], ["SIGHUP"], ["SIGINT", "SIGINT"], ["SIGTERM", "SIGTERM", "SIGINT"]])
def test_a_stop_leaves_a_checkpoint(numbers: list[str], make: Callable[..., veneer.Run]) -> None:
    run = make()

    def stop() -> None:
        for name in numbers:
            os.kill(os.getpid(), signal.Signals[name])

    with pytest.raises(Interrupted, match="step-000003"):
        TrainingJob(run).fit((Hears(3, stop),))
    veneer.train(run, resume=True)
    assert len(losses(run.train.output_dir)) == 6


def test_an_ignored_hangup_stays_ignored(make: Callable[..., veneer.Run]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        TrainingJob(make()).fit((Hears(3, lambda: os.kill(os.getpid(), signal.SIGHUP)),))
        with polite_kills():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("step", [2, 6])
def test_an_evaluation_gives_way_to_a_stop(
    step: int, make: Callable[..., veneer.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make("whole", **EVALUATES, evaluate={"batch_size": 1})
    veneer.train(whole)
    run = make(**EVALUATES, evaluate={"batch_size": 1})
    job, asked = TrainingJob(run), 0
    judge = job.engine.losses

    def stops(batch: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == step:  # one evaluation every two steps, of two batches if nobody stops it
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(batch)

    monkeypatch.setattr(job._loop, "_held_out", job._loop._held_out)
    monkeypatch.setattr(job.engine, "losses", stops)
    asked = step - 1 - 2 * (step // 2 - 1)
    stop_at = asked + 1 + 2 * (step // 2 - 1)
    asked, step = 0, stop_at
    with pytest.raises(Interrupted):
        job.fit()
    veneer.train(run, resume="auto")
    assert losses(run.train.output_dir, "eval") == losses(whole.train.output_dir, "eval")
    assert weights(run.train.output_dir) == weights(whole.train.output_dir)
