"""Checkpoints are written beside the training, are of their own step, and a disk that fails costs nothing saved."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import veneer
from tests.support.runs import losses, some_rows, tiny_run, write_rows
from veneer.config import JobError
from veneer.training import checkpoint
from veneer.training.job import TrainingJob

TRAIN = {"max_steps": 4, "save_steps": 2, "save_total_limit": 3}


@pytest.fixture
def run(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., veneer.Run]:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())

    def make(name: str, **sections: Any) -> veneer.Run:
        return tiny_run(tiny_model(), rows, tmp_path / name, train=TRAIN, **sections)

    return make


@pytest.mark.parametrize("adapter", [{"r": 4}, None])
def test_training_goes_on_while_a_checkpoint_is_written(
    adapter: dict[str, Any] | None, run: Callable[..., veneer.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TrainingJob(run("plain", adapter=adapter)).fit()
    has_gone_on, write = threading.Event(), checkpoint.write

    def slow(folder: Path, snapshot: checkpoint.Snapshot) -> None:
        assert has_gone_on.wait(60)
        write(folder, snapshot)

    monkeypatch.setattr(checkpoint, "write", slow)

    def listen(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            assert not (tmp_path / "slow" / "checkpoints" / "step-000002").exists()
            has_gone_on.set()

    TrainingJob(run("slow", adapter=adapter)).fit((listen,))
    for step in ("step-000002", "step-000004"):
        found, expected = (tmp_path / name / "checkpoints" / step for name in ("slow", "plain"))
        assert {file.name: file.read_bytes() for file in found.iterdir()} == {
            file.name: file.read_bytes() for file in expected.iterdir()
        }


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "free 1 MiB on the disk of"),
        (OSError(errno.EROFS, "Read-only file system"), "make .* writable again"),
    ],
)
@pytest.mark.parametrize("written", ["a checkpoint", "the adapter"])
def test_a_disk_that_fails_ends_the_run_with_what_was_saved(
    error: Exception, fix: str, written: str, run: Callable[..., veneer.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise error

    settings = run("run")
    folder, write = settings.train.output_dir, checkpoint.write
    with monkeypatch.context() as patch:
        if written == "a checkpoint":
            patch.setattr(checkpoint, "write", lambda at, one: write(at, one) if one.step == 2 else fail())
        else:
            patch.setattr("veneer.training.job.save_adapter", fail)
        step = "step-000002" if written == "a checkpoint" else "step-000004"
        with pytest.raises(JobError, match=f"could not be written .*{step} is intact(.|\n)*fix: {fix}"):
            TrainingJob(settings).fit()
    assert not (folder / "adapter").exists()
    TrainingJob(settings, resume=True).fit()
    assert len(losses(folder)) == 4
    assert (folder / "adapter").is_dir()
