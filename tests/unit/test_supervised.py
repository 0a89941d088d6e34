"""A run that is killed, stopped or disturbed loses nothing, and one command goes on with it."""

import contextlib
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import veneer
import veneer.api.train as train_module
from tests.support.notices import notified
from tests.support.runs import losses, tiny_run, write_rows
from veneer.api.train import finish
from veneer.cli.lasting import Lasting, polite_kills
from veneer.config import Interrupted, RunFolder, UserError, cache, load_run, run_folder
from veneer.config.cache import cached
from veneer.config.folder import remove
from veneer.model.locate import BaseSource
from veneer.release.publish.card import licence
from veneer.report.run_page import run_page
from veneer.training import job as job_module
from veneer.training.finished import finished
from veneer.training.job import TrainingJob
from veneer.training.metrics import MetricsFile, read_metrics

Call = Callable[..., tuple[int, str, str]]
EVALUATES: dict[str, Any] = {"data": {"validation": 2}, "train": {"eval_steps": 2, "save_steps": None}}


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Signals as an interactive shell leaves them, whatever the tests were started by."""
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> Callable[..., veneer.Run]:
    """Settings of a tiny run, in a folder by name."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return lambda name="run", **sections: tiny_run(tiny_model(), path, tmp_path / name, **sections)


@pytest.fixture
def folder(run_file: Path) -> RunFolder:
    """Of the run in `run_file`."""
    return RunFolder(load_run(run_file).train.output_dir)


class Hears:
    """Does something when a step has been logged."""

    def __init__(self, step: int, do: Callable[[], None], kind: str = "train") -> None:
        self._step, self._do, self._kind = step, do, kind

    def __call__(self, record: dict[str, Any]) -> None:
        if (record["step"], record["kind"]) == (self._step, self._kind):
            self._do()


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
    assert {key: json.loads(out)[key] for key in ("steps", "final_loss")} == {
        "steps": 6,
        "final_loss": began["final_loss"],
    }
    assert "finished already" in call("train", "--resume", "auto", str(run_file))[1]
    assert weights(folder.path) == before
    status, _, err = call("train", str(run_file), "train.learning_rate=0.5", "--resume", "auto")
    assert status == 2
    assert "train.learning_rate: was 0.01, is 0.5" in err
    assert call("train", str(run_file), "--resume", "auto", "--overwrite")[0] == 2
    assert "finished already" in call("train", str(run_file), "--resume")[1]


def test_a_folder_whose_run_never_began_is_free(make: Callable[..., veneer.Run]) -> None:
    whole = make("whole")
    veneer.train(whole)
    run = make()
    folder = RunFolder(run.train.output_dir)
    folder.path.mkdir()
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
    (folder.path / ".checkpoints.0123456789ab").mkdir()  # of one that was killed as it looked at a finished run
    (folder.path / ".lock").touch()
    veneer.train(run, resume="auto")
    assert not [path for path in folder.path.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("kept", range(12))
def test_a_kill_while_a_run_is_replaced_leaves_a_run_or_a_free_folder(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, removed = RunFolder(tmp_path / "run"), 0
    for name in ("checkpoints", "adapter"):
        (folder.path / name).mkdir(parents=True)
    for path in (folder.run, folder.plan, folder.ledger, folder.personal, folder.metrics, folder.loss_plot):
        path.touch()
    folder.environment.write_text('{"libraries": {"veneer": "1"}}')

    def killed(path: Path) -> None:
        nonlocal removed
        removed += path.exists()
        if removed > kept:
            raise RuntimeError
        remove(path)

    monkeypatch.setattr(run_folder, "remove", killed)
    with contextlib.suppress(RuntimeError):
        folder.remove()
    if folder.run.exists():
        assert folder.plan.exists(), "what --resume compares with"
    else:
        folder.require_free()


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


@pytest.mark.parametrize("evaluation", [1, 3])
def test_an_evaluation_gives_way_to_a_stop(
    evaluation: int, make: Callable[..., veneer.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the run, where no checkpoint was due, and after its last step."""
    whole, run = (make(name, **EVALUATES, evaluate={"batch_size": 1}) for name in ("whole", "run"))
    veneer.train(whole)
    job = TrainingJob(run)
    judge, batches = job.engine.token_logprobs, [0]

    def stops(batch: Any) -> Any:
        batches[0] += 1
        if batches[0] == 2 * evaluation - 1:  # the first of its two batches
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(batch)

    monkeypatch.setattr(job.engine, "token_logprobs", stops)
    with pytest.raises(Interrupted, match=f"step-00000{2 * evaluation}"):
        job.fit()
    assert batches[0] == 2 * evaluation - 1
    veneer.train(run, resume="auto")
    assert losses(run.train.output_dir, "eval") == losses(whole.train.output_dir, "eval")
    assert weights(run.train.output_dir) == weights(whole.train.output_dir)


def test_a_kill_before_training_is_polite(
    call: Call, run_file: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        monkeypatch.setattr(job_module, "load_parts", lambda *given, n=number: os.kill(os.getpid(), n))
        status, _, err = call("train", str(run_file))
        assert status == 130
        assert err.splitlines()[-2] == "stopped: no checkpoint was written yet"
    assert not folder.path.exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_outlives_who_reads_its_output(
    call: Call, run_file: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert call("train", str(run_file))[0] == 0
        assert sys.stdout is gone
        monkeypatch.undo()
    assert folder.adapter.exists()


def test_a_result_that_a_full_disk_took_is_status_1(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = call("--version")
        monkeypatch.undo()
    assert status == 1
    assert "standard output could not be written (No space left on device)" in err


def test_a_closed_terminal_takes_output_alone() -> None:
    keeper, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        os.close(keeper)
        lasting = Lasting(stream)
        for _ in range(2):
            lasting.write("step 1\n")
            lasting.flush()
        assert isinstance(lasting.error, OSError)
        assert stream.fileno() == lasting.fileno()


def test_a_worker_ends_with_its_parent() -> None:
    reader, writer = os.pipe()
    code = (
        "import os, sys, time\n"
        "from veneer.data.tokens.tokenize import _end_with\n"
        "parent = os.getpid()\n"
        "if os.fork() == 0: _end_with(parent)\n"
        "os.write(1, b'x')\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    process.kill()
    process.wait()
    with os.fdopen(reader, "rb") as left:
        assert left.read() == b"", "the end of the pipe comes when the last process that holds it has ended"


def test_a_line_of_metrics_that_fails_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    records = [{"kind": "train", "step": n, "loss": 1.0} for n in range(1, 5)]
    file.restart([])
    file.append(records[0])
    real = Path.open

    def broken(self: Path, *given: Any) -> Any:
        with real(self, *given) as stream:
            stream.write(b'{"kind": "tr')  # half a line got out
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", broken)
    with notified(r"metrics\.jsonl: cannot be written \(Input/output error\)"):
        file.append(records[1])
    file.append(records[2])  # said once
    monkeypatch.undo()
    file.append(records[3])
    assert read_metrics(tmp_path / "metrics.jsonl") == records


def test_metrics_that_cannot_be_written_cost_no_adapter(
    make: Callable[..., veneer.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make()
    real = Path.open

    def broken(self: Path, *given: Any, **more: Any) -> Any:
        if self.name == "metrics.jsonl" and given == ("ab",):
            raise OSError(5, "Input/output error")
        return real(self, *given, **more)

    monkeypatch.setattr(Path, "open", broken)
    with notified("cannot be written"):
        trained = veneer.train(run)
    assert trained.final_loss is not None
    assert (run.train.output_dir / "adapter" / "README.md").is_file()


def test_a_held_out_loss_that_is_not_finite_costs_no_adapter(
    make: Callable[..., veneer.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(**EVALUATES)
    job = TrainingJob(run)
    judge = job.engine.token_logprobs
    monkeypatch.setattr(job.engine, "token_logprobs", lambda batch: judge(batch) * math.nan)
    with notified(r"the held-out loss after step \d is nan"):
        finish(job)
    folder = run.train.output_dir
    assert losses(folder, "eval") == [None] * 3
    assert (folder / "loss.png").is_file()
    assert "adapter" in run_page(folder)


@pytest.mark.parametrize("part", ["write_card", "plot_loss"])
def test_what_decorates_a_run_costs_no_adapter(
    part: str, make: Callable[..., veneer.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*given: Any) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(f"veneer.api.train.{part}", breaks)
    run = make()
    with notified(r"could not be written \(KeyError: 'odd'\)"):
        veneer.train(run)
    assert {"adapter_model.safetensors", "passport.json"} <= {
        path.name for path in RunFolder(run.train.output_dir).adapter.iterdir()
    }
    assert veneer.train(run, resume="auto").steps == 6


@pytest.mark.parametrize("head", ["license: mit\ndate: 2024-13-45", "license: [mit]", "license: 'mit", "[" * 2_000])
def test_a_readme_that_cannot_be_read_states_no_licence(head: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\ntext")
    assert licence(BaseSource("folder", str(tmp_path), str(tmp_path))) is None


def test_a_lock_that_waits_says_what_for(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "SILENT_SECONDS", 0.01)
    (empty_cache / "tokens").mkdir(parents=True)
    held = os.open(empty_cache / "tokens" / ".a.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    release = threading.Timer(0.3, os.close, (held,))
    release.start()
    cached("tokens/a", lambda made: None)
    release.join()
    assert f"waiting for another process, which makes {empty_cache / 'tokens' / 'a'}" in capsys.readouterr().err


LONG = "x" * 256
WRONG: list[tuple[list[str], str]] = [
    (["train.output_dir=" + LONG], "train.output_dir = "),
    (["train.output_dir=" + "runs/" * 900], "train.output_dir = "),
    (["model.base=./" + LONG], "model.base = "),
    (["data.train=" + LONG + ".jsonl"], "data.train = "),
    (['data.train="a\\0b"'], "data.train = "),
    (['model.base="a\\0b"'], "model.base = "),
    (['train.output_dir="a\\0b"'], "train.output_dir = "),
]


@pytest.mark.parametrize(("given", "setting"), WRONG)
@pytest.mark.parametrize("resume", [(), ("--resume", "auto")])
def test_what_cannot_be_a_path_is_told_at_once(
    given: list[str], setting: str, resume: tuple[str, ...], call: Call, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "TrainingJob", None)  # it does not come to that
    status, _, err = call("train", str(run_file), *given, *resume)
    assert status == 2, err
    assert setting in err
    assert "NUL" in err or "at most" in err


@pytest.mark.parametrize("arguments", [["train", LONG + ".yaml"], ["generate", LONG, "-p", "x"], ["evaluate", LONG]])
def test_other_names_too_long_are_told_too(arguments: list[str], call: Call) -> None:
    status, _, err = call(*arguments)
    assert (status, "a name in it has 2" in err) == (2, True), err


def test_a_disk_without_inodes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk:
        f_files, f_favail, f_bavail, f_blocks, f_bfree, f_frsize = 1000, 3, 1000, 1000, 1000, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Disk)
    with pytest.raises(UserError, match=r"the disk can take 3 more files \(inodes\), a run needs 100"):
        RunFolder(tmp_path / "run").require_writable(1)
    assert not list(tmp_path.iterdir())
    Disk.f_files = Disk.f_favail = 0  # as file systems say that have no limit
    RunFolder(tmp_path / "run").require_writable(1)
