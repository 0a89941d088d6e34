"""What a person is told: once, on standard error, by the first of several processes, and kept in the run's folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.notices import notified
from tests.support.runs import StopAt, tiny_run, write_rows
from veneer.api.train import finish
from veneer.config import Interrupted, JobError, RunFolder
from veneer.config.notify import Notices, collected, kept_in, notify, notify_on_error
from veneer.training.job import TrainingJob


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_it_is_printed_once_and_kept_each_time(
    tmp_path: Path, notices: Notices, capsys: pytest.CaptureFixture[str]
) -> None:
    with notified("the disk is slow"):
        notices.said = set()
        notify("fetching a model", "info", "model.base")
        with kept_in(tmp_path / "events.jsonl"):
            for _ in range(3):
                notify("the disk is slow", where="train.output_dir")
        notify("said too late for the file", "info")
    out, err = capsys.readouterr()
    assert out == "", "standard output is for results"
    assert err == "fetching a model\nwarning: the disk is slow\nsaid too late for the file\n"
    kept = lines(tmp_path / "events.jsonl")
    assert [(event["level"], event["where"]) for event in kept] == [
        ("info", "model.base"),
        *[("warning", "train.output_dir")] * 3,
    ]
    assert {tuple(event) for event in kept} == {("time", "level", "message", "where")}


def test_each_run_of_a_block_keeps_its_own(tmp_path: Path) -> None:
    with collected():
        for name in ("one", "two"):
            notify(f"loading {name}", "info")
            with kept_in(tmp_path / name):
                notify(f"training {name}", "info")
    for name in ("one", "two"):
        assert [event["message"] for event in lines(tmp_path / name)] == [f"loading {name}", f"training {name}"]


def test_the_error_that_ends_a_block_is_kept_and_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(JobError), kept_in(tmp_path / "events.jsonl"):
        raise JobError("the loss is nan")
    for stop in (Interrupted(tmp_path), KeyboardInterrupt()):
        with pytest.raises(type(stop)), kept_in(tmp_path / "events.jsonl"):
            raise stop
    assert [(event["level"], event["message"]) for event in lines(tmp_path / "events.jsonl")] == [
        ("error", "the loss is nan")
    ]
    assert capsys.readouterr() == ("", "")


def test_other_ranks_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with kept_in(tmp_path / "events.jsonl"):
        notify("said by every rank")
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "events.jsonl").exists()


def test_control_characters_of_others_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    notify("a file named \x1b[2J", "info")
    assert capsys.readouterr().err == "a file named \\x1b[2J\n"


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "later" / "events.jsonl"
    with kept_in(file):
        notify("before the folder is there", "info")
        file.parent.mkdir()
        notify("after", "info")
    assert [event["message"] for event in lines(file)] == ["before the folder is there", "after"]


def test_what_decorates_a_result_costs_nothing() -> None:
    def breaks() -> None:
        raise KeyError("odd")

    with notified(r"the card could not be written \(KeyError: 'odd'\)"):
        notify_on_error("the card", breaks)


def test_a_run_keeps_what_was_said_while_it_was_loaded_and_trained(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    train = {"max_steps": 3, "save_steps": 1}
    run = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", train=train)
    with collected():
        notify("said while it is loaded", "info")
        job = TrainingJob(run)
        assert not (tmp_path / "run").exists()
        with pytest.raises(Interrupted):
            finish(job, [StopAt(2)])
    job = TrainingJob(run, resume=True)
    assert job.done == 1
    finish(job, [])
    folder = RunFolder(tmp_path / "run")
    assert [event["message"] for event in lines(folder.events)] == [
        "said while it is loaded",
        f"resuming from {folder.checkpoints / 'step-000001'}",
    ]
