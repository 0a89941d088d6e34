"""`veneer runs` says how each run stands, and passes over what is damaged or no run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.run_folders import eval_record, make_run, train_record, write_lines
from tests.support.runs import StopAt, some_rows, tiny_run, write_rows
from veneer.config import Interrupted, JobError, RunFolder
from veneer.config.run_state import run_state
from veneer.config.tail import BLOCK, last_of_kinds

Call = Callable[..., tuple[int, str, str]]


def failed(folder: Path) -> Path:
    events = [{"level": "info", "message": "all is well"}, {"level": "error", "message": "the loss is nan\n  fix: it"}]
    write_lines(make_run(folder, [train_record(3)]) / "events.jsonl", events)
    return folder


def test_each_state_is_told_with_its_numbers(tmp_path: Path, call: Call) -> None:
    make_run(tmp_path / "done", [*map(train_record, range(1, 11)), eval_record(10)], is_finished=True)
    stopped = make_run(tmp_path / "sweep" / "trials" / "stopped", [eval_record(4, None), train_record(5, 1.25)])
    (stopped / "checkpoints" / "step-000004").mkdir(parents=True)
    failed(tmp_path / "failed")
    (make_run(tmp_path / "new") / "run.yaml").unlink()
    held = make_run(tmp_path / "held", [train_record(1)])
    with RunFolder(held).locked():
        status, out, err = call("runs", str(tmp_path), "--json")
    assert (status, err) == (0, "")
    found = {Path(run["run_dir"]).name: run for run in json.loads(out)["runs"]}
    assert {name: run["state"] for name, run in found.items()} == {
        **{"done": "finished", "stopped": "interrupted", "failed": "failed", "new": "not begun", "held": "training"}
    }
    assert found["done"] | {"step": 10, "steps": 10, "loss": 2.0, "held_out_loss": 1.5} == found["done"]
    assert found["done"] | {"best_metric": "loss", "best_step": 10, "best_value": 1.5} == found["done"]
    assert found["done"] | {"tokens_per_second": 200.0, "base": "org/base", "task": "causal-lm"} == found["done"]
    assert found["stopped"] | {"step": 5, "loss": 1.25, "held_out_loss": None, "resumes_from": 4} == found["stopped"]
    assert found["failed"]["message"].startswith("the loss is nan")

    status, out, _ = call("runs", str(tmp_path))
    assert status == 0
    assert "10/10" in next(line for line in out.splitlines() if line.startswith(str(tmp_path / "done")))
    assert f"failed   {tmp_path / 'failed'}: the loss is nan" in out


def test_the_run_written_last_comes_first(tmp_path: Path) -> None:
    for name, time in (("a", 2000), ("b", 3000), ("c", 1000)):
        for file in make_run(tmp_path / name, [train_record(1)]).iterdir():
            os.utime(file, (time, time))
    found = veneer.runs(tmp_path, tmp_path / "a").runs
    assert [Path(run.run_dir).name for run in found] == ["b", "a", "c"], "and each once"
    assert found[0].last_written == "1970-01-01T00:50:00+00:00"


@pytest.mark.parametrize(
    "settings", ["", "a: [", "- 1", "model: 3", "model: {base: 7}", "model: {}", "\x00", "services: {web: {image: x}}"]
)
def test_what_is_no_run_is_told_in_one_line(tmp_path: Path, call: Call, settings: str) -> None:
    make_run(tmp_path / "good", [])
    (make_run(tmp_path / "bad") / "run.yaml").write_text(settings)
    (tmp_path / "photos" / "run").mkdir(parents=True)
    (tmp_path / "photos" / "environment.json").write_text("{}")
    status, out, err = call("runs", str(tmp_path))
    assert (status, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("skipped")] == [
        f"skipped  {tmp_path / 'bad'}"
    ]
    assert "photos" not in out
    assert str(tmp_path / "good") in out


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"\xff\xfe", b"[1]\n", b'{"kind": "train"}\n', b'{"kind": ["train"], "step": 1}\n', b"{" * 9000],
)
def test_damaged_records_leave_numbers_out(tmp_path: Path, call: Call, content: bytes) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(content)
    (folder / "events.jsonl").write_bytes(content)
    (folder / "plan.json").write_bytes(content)
    state = run_state(folder)
    assert (state.state, state.step, state.loss, state.steps) == ("interrupted", 0, None, None)
    assert call("runs", str(tmp_path))[0] == 0


def test_values_of_other_types_are_left_out(tmp_path: Path, call: Call) -> None:
    wrong: dict[str, Any] = {"loss": "x", "tokens_per_second": None, "step": True}
    folder = make_run(tmp_path / "run", [train_record(1) | wrong, eval_record(1) | {"best_step": [], "best_value": {}}])
    state = run_state(folder)
    assert (state.loss, state.tokens_per_second, state.best_step, state.best_value) == (None, None, None, None)
    assert call("runs", str(tmp_path))[0] == 0


def test_records_far_from_the_end_and_a_cut_last_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    steps = [train_record(step) for step in range(2, 4000)]
    write_lines(file, [eval_record(1), *steps])
    assert file.stat().st_size > 3 * BLOCK
    with file.open("a") as out:
        out.write('{"kind": "train", "step": 4000')
    found = last_of_kinds(file, "train", "eval")
    assert found == {"train": steps[-1], "eval": eval_record(1)}


def test_no_folder_and_no_runs(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = call("runs")
    assert (status, err.splitlines()[0]) == (2, "error: runs: no such folder")
    (tmp_path / "runs").mkdir()
    assert call("runs") == (0, "no runs in runs\n", "")
    (tmp_path / "file").touch()
    assert call("runs", "file")[1].endswith("skipped  file: not a folder\n")


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [train_record(1)])
    code = f"import sys, veneer; veneer.runs({str(tmp_path)!r}); next(veneer.watch({str(tmp_path / 'run')!r})); "
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_listing_writes_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [train_record(1)])
    (folder / ".lock").touch()  # of a process that was killed
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    assert run_state(folder).state == "interrupted"
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before


def test_a_tiny_run_is_followed_through_its_states(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    run = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", some_rows()), tmp_path / "runs" / "a")
    seen: list[str] = []

    def fail(record: dict[str, Any]) -> None:
        seen.append(run_state(run.train.output_dir).state)
        if record["step"] == 2:
            raise JobError("the loss is nan")

    with pytest.raises(JobError):
        veneer.train(run, listeners=[fail])
    state = run_state(run.train.output_dir)
    assert (seen, state.state, state.message) == (["training"] * 2, "failed", "the loss is nan")

    with pytest.raises(Interrupted):
        veneer.train(run, resume="auto", listeners=[StopAt(3)])
    state = run_state(run.train.output_dir)
    assert (state.state, state.step, state.steps) == ("interrupted", 3, 6), "it began anew, and the error is gone"
    veneer.train(run, resume="auto")
    assert run_state(run.train.output_dir).state == "finished"
