"""Trackers get a run's records and never get in the way of the training, whatever they do."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.notices import notified
from tests.support.runs import StopAt, some_rows, tiny_run, write_rows
from veneer.config import Interrupted, RunFolder, UserError
from veneer.training.metrics import read_metrics
from veneer.training.trackers import TRACKERS, require_trackers, tracking
from veneer.training.trackers.tracker import RunState, TrackedRun, values_of

MakeRun = Callable[..., veneer.Run]


class RecordingTracker:
    """A tracker that keeps what it is told."""

    made: list["RecordingTracker"] = []  # noqa: RUF012 - emptied by the fixture
    where = "here"

    @staticmethod
    def load() -> None: ...

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.id = run, run.id or "made"
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.state: RunState | None = None
        self.made.append(self)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged.append((step, values))

    def close(self, state: RunState) -> None:
        self.state = state


class BrokenTracker(RecordingTracker):
    """Raises where it is told to."""

    at = ""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self.fail("open")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.fail("log")

    def close(self, state: RunState) -> None:
        self.fail("close")

    def fail(self, where: str) -> None:
        if where == self.at:
            raise ConnectionError("https://me:hunter2@tracker.example refused s3cr3t-key")


class HangingTracker(BrokenTracker):
    """Does not return where it is told to, until the test ends."""

    until = threading.Event()

    def fail(self, where: str) -> None:
        if where == self.at:
            self.until.wait()


class SlowTracker(RecordingTracker):
    def log(self, step: int, values: dict[str, float]) -> None:
        time.sleep(0.05)
        super().log(step, values)


@pytest.fixture
def make_run(tiny_model: Callable[..., Path], tmp_path: Path) -> MakeRun:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())

    def make(name: str = "tracked", report_to: tuple[str, ...] = ("wandb",), **train: Any) -> veneer.Run:
        settings = {"eval_steps": 2, "save_steps": 2, "report_to": report_to, **train}
        return tiny_run(tiny_model(), rows, tmp_path / name, data={"validation": 2}, train=settings)

    return make


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No client is needed: the fakes stand for W&B's and MLflow's."""
    RecordingTracker.made.clear()
    HangingTracker.until.clear()
    monkeypatch.setattr("veneer.api.train.require_trackers", lambda names: None)
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(TRACKERS, name, RecordingTracker)
    yield
    HangingTracker.until.set()
    for thread in threading.enumerate():
        if thread.name.startswith("veneer-"):
            thread.join(5)


def adapter_of(run: veneer.Run) -> bytes:
    return (RunFolder(run.train.output_dir).adapter / "adapter_model.safetensors").read_bytes()


def test_a_tracker_gets_the_run_and_the_numbers_of_each_record(make_run: MakeRun) -> None:
    run = make_run()
    veneer.train(run)
    (tracker,) = RecordingTracker.made
    folder = RunFolder(run.train.output_dir)
    assert tracker.logged == [(record["step"], values_of(record)) for record in read_metrics(folder.metrics)]
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(tracker.logged[0][1])
    assert "eval/loss" in tracker.logged[2][1]
    assert (tracker.run.name, tracker.state) == ("tracked", "finished")
    assert tracker.run.about["run.yaml"]["adapter"]["r"] == 4
    assert tracker.run.about["ledger.json"]["rows"]["read"] == 16
    assert tracker.run.about["plan.json"]["steps"] == 6


def test_nothing_private_is_told(make_run: MakeRun, tmp_path: Path) -> None:
    veneer.train(make_run())
    about = json.dumps(RecordingTracker.made[0].run.about)
    assert str(tmp_path) not in about
    assert not any(row["prompt"] in about for row in some_rows())


def test_a_resumed_run_goes_on_under_its_id(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(Interrupted):
        veneer.train(run, listeners=[StopAt(3)])
    veneer.train(run, resume=True)
    first, second = RecordingTracker.made
    assert (first.run.id, first.state) == (None, "interrupted")
    assert (second.run.id, second.state, second.run.step) == ("made", "finished", 2)
    assert [step for step, values in second.logged if "train/loss" in values] == [3, 4, 5, 6]


def test_a_tracker_added_on_resume_gets_the_steps_before(make_run: MakeRun) -> None:
    with pytest.raises(Interrupted):
        veneer.train(make_run(report_to=()), listeners=[StopAt(3)])
    veneer.train(make_run(), resume=True)
    (tracker,) = RecordingTracker.made
    assert [step for step, values in tracker.logged if "train/loss" in values] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_fails_is_closed_as_failed(make_run: MakeRun) -> None:
    def fail(record: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        # The second step ends it: a listener stands before the trackers.
        veneer.train(make_run(), listeners=[lambda record: fail(record) if record["step"] == 2 else None])
    assert RecordingTracker.made[0].state == "failed"


@pytest.mark.parametrize("at", ["open", "log", "close"])
@pytest.mark.parametrize("kind", [BrokenTracker, HangingTracker])
def test_a_tracker_that_fails_or_hangs_costs_nothing_but_a_warning(
    at: str, kind: type[BrokenTracker], make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_run("plain", report_to=())
    veneer.train(plain)
    monkeypatch.setitem(TRACKERS, "wandb", kind)
    monkeypatch.setattr(kind, "at", at)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.3)
    monkeypatch.setenv("TRACKER_API_KEY", "s3cr3t-key")
    run = make_run(report_to=("wandb", "mlflow"))
    with notified("train.report_to: wandb ") as said:
        veneer.train(run)
    assert len(said) == 1
    assert "hunter2" not in said[0]
    assert "s3cr3t" not in said[0]
    assert adapter_of(run) == adapter_of(plain)
    other = next(one for one in RecordingTracker.made if type(one) is RecordingTracker)
    assert (len(other.logged), other.state) == (9, "finished")
    events = RunFolder(run.train.output_dir).events.read_text()
    assert "train.report_to: wandb" in events
    assert "hunter2" not in events


def test_what_a_slow_tracker_cannot_take_is_left_out(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", SlowTracker)
    monkeypatch.setattr(tracking, "MOST_WAITING", 2)
    with notified("does not keep up"):
        veneer.train(make_run(max_steps=12))
    (tracker,) = RecordingTracker.made
    assert 0 < len(tracker.logged) < 18
    assert tracker.state == "finished"


def test_only_the_first_process_reports(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    run = make_run()
    veneer.train(run)
    assert RecordingTracker.made == []
    assert not RunFolder(run.train.output_dir).trackers.exists()


def test_an_absent_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb, mlflow are not .*\n  fix: pip install 'veneer\[wandb,mlflow\]'"):
        require_trackers(["wandb", "mlflow", "wandb"])


def test_the_command_refuses_an_absent_client_before_it_loads(
    run_file: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, error = call("train", str(run_file), "train.report_to=[trackio]")
    assert status == 2
    assert "pip install 'veneer[trackio]'" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("written", ["report_to=[neptune]", "report_to=wandb"])
def test_what_is_no_list_of_trackers_is_refused(
    written: str, run_file: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, error = call("train", str(run_file), f"train.{written}")
    assert status == 2
    assert "write a list of tensorboard, wandb, trackio and mlflow" in error


def test_tensorboard_reads_a_run_that_was_resumed(make_run: MakeRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run(report_to=("tensorboard",))
    with pytest.raises(Interrupted):
        veneer.train(run, listeners=[StopAt(3)])
    veneer.train(run, resume=True)
    folder = RunFolder(run.train.output_dir)
    found = EventAccumulator(str(folder.trackers / "tensorboard")).Reload()
    for kind in ("train", "eval"):
        expected = {one["step"]: one["loss"] for one in read_metrics(folder.metrics) if one["kind"] == kind}
        # The evaluation of the checkpoint's step is made again. Event files hold float32.
        scalars = {event.step: event.value for event in found.Scalars(f"{kind}/loss")}
        assert scalars == pytest.approx(expected, rel=2**-23)
    texts = {tag.removesuffix("/text_summary") for tag in found.Tags()["tensors"]}
    assert texts == {"run.yaml", "plan.json", "ledger.json"}
