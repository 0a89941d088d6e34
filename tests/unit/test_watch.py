"""`veneer watch` follows a run from before it begins to its end, over a resume, and leaves it alone."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.run_folders import append_line, eval_record, make_run, train_record, write_lines
from veneer.api.watch import Look, watch
from veneer.config import RunFolder, UserError

Call = Callable[..., tuple[int, str, str]]


class Script:
    """Stands in for the sleep between two looks: what the run does meanwhile, one action for each."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self._actions: Iterator[Callable[[], object]] = iter(actions)

    def __call__(self, seconds: float) -> None:
        next(self._actions, stop)()


def stop() -> None:
    raise KeyboardInterrupt


def steps(look: Look) -> list[int]:
    return [record["step"] for record in look.records]


def test_looks_find_what_is_new_and_what_was_cut_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    looks = watch(folder.path, poll_seconds=0)
    assert next(looks) == Look(has_begun=False, is_training=False)
    with folder.locked():
        (folder.path / "plan.json").touch()
        assert next(looks) == Look(has_begun=False, is_training=True)
    make_run(tmp_path / "made", [train_record(1)])
    for file in (tmp_path / "made").iterdir():
        file.replace(folder.path / file.name)
    with folder.locked():
        assert steps(next(looks)) == [1]
        with folder.metrics.open("a") as out:
            text = json.dumps(train_record(2)) + "\n"
            out.write(text[:20])
            out.flush()
            assert steps(next(looks)) == [], "half a line is none"
            out.write(text[20:])
        assert steps(next(looks)) == [2]
        append_line(folder.events, {"level": "info", "message": "told"})
        append_line(folder.metrics, {"no": "record"})
        append_line(folder.metrics, train_record(3))
        look = next(looks)
        assert (steps(look), look.goes_on_from, look.events) == ([3], None, [{"level": "info", "message": "told"}])

        other = tmp_path / "other"  # as a resumed run does: a new file, renamed into place
        write_lines(other, [train_record(1), train_record(2)])
        other.replace(folder.metrics)
        look = next(looks)
        assert (steps(look), look.goes_on_from) == ([], 2)
        append_line(folder.metrics, train_record(3, loss=7.0))
        look = next(looks)
        assert (steps(look), look.goes_on_from) == ([3], None)

        write_lines(other, [train_record(1, loss=9.0)])
        other.replace(folder.metrics)
        look = next(looks)
        assert (steps(look), look.goes_on_from) == ([1], 0), "it began anew"
        write_lines(folder.metrics, [])  # cut back in place
        assert next(looks).goes_on_from == 0
    assert not next(looks).is_training
    with pytest.raises(StopIteration):
        next(looks)


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    with pytest.raises(UserError, match="not a folder"):
        next(watch(tmp_path / "run.yaml"))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_run_is_shown_from_before_it_begins_to_its_end(
    folder: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = folder.locked()

    def begin() -> None:
        make_run(folder.path, [])
        lock.__enter__()

    def train() -> None:
        for step in range(1, 10):
            append_line(folder.metrics, train_record(step))
        append_line(folder.metrics, eval_record(9))
        append_line(folder.events, {"level": "warning", "message": "memory is short", "where": ""})

    def finish() -> None:
        append_line(folder.metrics, train_record(10, loss=0.5))
        folder.adapter.mkdir()
        lock.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", Script(begin, train, finish))
    status, out, err = call("watch", str(folder.path))
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == [f"waiting for {folder.path} to begin", "  10 steps to train, about 0:05 as predicted"]
    assert lines[2].startswith("  step 1: loss 2.0000  200 tok/s  1.00 GiB  0:00 left")
    assert "  step 9: held-out loss 1.5000" in lines
    assert "warning: memory is short" in lines
    assert lines[-3] == "  step 10: loss 0.5000  200 tok/s  1.00 GiB"
    assert lines[-2:] == ["done     10 steps, final loss 0.5000", "best     loss 1.5 after step 9"]


def test_a_run_that_has_ended_is_shown_with_its_state(tmp_path: Path, call: Call) -> None:
    done = make_run(tmp_path / "done", [train_record(step) for step in (9, 10)], is_finished=True)
    status, out, _ = call("watch", str(done))
    assert status == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [
        *("  10 steps to train", "  step 9", "  step 10", "done     10 steps, final loss 2.0000")
    ]
    assert "left" not in out, "nothing is left, and of past steps it is not known"

    stopped = make_run(tmp_path / "stopped", [train_record(4)])
    (stopped / "checkpoints" / "step-000003").mkdir(parents=True)
    status, out, _ = call("watch", str(stopped))
    assert status == 1
    assert out.splitlines()[-1] == "stopped  at step 4 of 10; `train --resume` goes on from the checkpoint of step 3"

    write_lines(stopped / "events.jsonl", [{"level": "error", "message": "the loss is nan", "where": ""}])
    status, out, err = call("watch", str(stopped), "--json")
    found = json.loads(out)
    assert (status, found["state"], found["message"]) == (1, "failed", "the loss is nan")
    assert "step 4: loss" in err


def test_a_stopped_run_is_waited_for_until_it_is_resumed(
    folder: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_run(folder.path, [train_record(step) for step in (1, 2, 3)])
    lock = folder.locked()

    def resume() -> None:
        lock.__enter__()
        write_lines(tmp_path / "other", [train_record(1), train_record(2)])
        (tmp_path / "other").replace(folder.metrics)

    def train() -> None:
        append_line(folder.metrics, train_record(3, loss=0.25))

    def finish() -> None:
        folder.adapter.mkdir()
        lock.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", Script(lambda: None, resume, train, finish))
    status, out, _ = call("watch", str(folder.path), "--wait")
    assert status == 0
    lines = [line.partition("  200")[0] for line in out.splitlines()]
    assert lines[4:] == [
        "  stopped; waiting for it to be resumed",
        "  the run goes on from step 2",
        "  step 3: loss 0.2500",
        "done     3 steps, final loss 0.2500",
    ]


def test_ctrl_c_ends_the_watching_alone(folder: RunFolder, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(folder.path, [train_record(1)])
    monkeypatch.setattr(time, "sleep", Script())
    with folder.locked():
        before = {path: path.stat().st_mtime_ns for path in folder.path.iterdir()}
        status, out, _ = call("watch", str(folder.path))
        assert {path: path.stat().st_mtime_ns for path in folder.path.iterdir()} == before
        assert folder.is_held()
    assert status == 130
    assert out.splitlines()[-1] == "no longer watched; the run itself is as it was"


@pytest.mark.parametrize("plan", ["{", '{"steps": null}', '{"steps": 10, "step_seconds": null}'])
def test_a_damaged_plan_costs_no_more_than_what_it_says(folder: RunFolder, call: Call, plan: str) -> None:
    make_run(folder.path, [train_record(1), eval_record(1, None)])
    (folder.path / "plan.json").write_text(plan)
    status, out, err = call("watch", str(folder.path))
    assert (status, err) == (1, "")
    assert "step 1: loss 2.0000" in out
    assert "held-out loss not finite" in out


def test_it_ends_with_the_reader_of_its_pipe(folder: RunFolder) -> None:
    make_run(folder.path, [train_record(1)])
    code = "from veneer.cli.main import main; main(['watch', sys.argv[1]])"
    with folder.locked():
        child = subprocess.Popen(
            [sys.executable, "-c", f"import sys; {code}", str(folder.path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline().startswith("  10 steps to train")
        child.stdout.close()
        while child.poll() is None:  # each line is one that nobody reads
            append_line(folder.metrics, eval_record(2))
            time.sleep(0.05)
    assert child.returncode == 0
