"""Unit tests keep what they cache to themselves, share one run to certify, and call commands in their process."""

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.certified import make_base, tickets
from tests.support.runs import losses, tiny_run, write_rows
from veneer.cli.main import main
from veneer.config import hub
from veneer.config.folder import write_bytes
from veneer.config.load import to_yaml
from veneer.config.notify import Notices, collected
from veneer.report.plots import plot_loss

USUAL = ("--force overrides", "the 4-bit weights", "the tokenizer kind")  # what tests make happen on purpose
frozen_modules = 0  # as many modules as there were when the heap was last frozen


class Forgetful(set[str]):
    """A set that nothing is ever in."""

    def add(self, message: str) -> None: ...


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports make no garbage to speak of; looking for it takes a quarter of their time."""
    gc.disable()
    result = yield
    gc.enable()
    return result


@pytest.fixture(autouse=True)
def _frozen_heap() -> None:
    """The objects of imported modules are not looked through for garbage again: each time would take 0.3 s."""
    global frozen_modules
    if len(sys.modules) != frozen_modules:
        gc.collect()
        gc.freeze()
        frozen_modules = len(sys.modules)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VENEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(hub, "_probe", lambda endpoint, period: None)  # nothing is asked of a network
        patch.setattr("os.fsync", lambda file: None)  # 3 ms each, for a crash that no test can make
        patch.setattr("veneer.api.train.plot_loss", _same_picture)
        yield


def _same_picture(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """A picture in place of a run's own, the drawing of which would take a quarter of a tiny run's time."""
    write_bytes(path, b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of a run's picture: it is drawn."""
    monkeypatch.setattr("veneer.api.train.plot_loss", plot_loss)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also where tests run in the background of a shell, which has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def notices() -> Iterator[Notices]:
    """A warning that no test expects (`notified`) fails the test, as Python's own warnings do."""
    with collected() as notices:
        notices.said = Forgetful()  # commands of one test say the same again, as they do in processes of their own
        yield notices
    unexpected = [event["message"] for event in notices.events if event["level"] == "warning"]
    assert [message for message in unexpected if not message.startswith(USUAL)] == []


@pytest.fixture
def any_notice(notices: Notices) -> Iterator[None]:
    """For tests in which some cases warn."""
    yield
    notices.events.clear()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command; gives its exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def run_file(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """The YAML file of a tiny run with two held-out rows."""
    train = write_rows(tmp_path / "rows.jsonl", rows)
    run = tiny_run(tiny_model(), train, tmp_path / "runs" / "tiny", data={"validation": 2})
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(run))
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt its rows, and answers and stops as they do; its base and another lie beside it."""
    folder = tmp_path_factory.mktemp("certify")
    make_base(folder / "base", 0)
    make_base(folder / "other-base", 1)
    rows, held_out = (
        write_rows(folder / name, tickets()[:: 1 + 3 * n]) for n, name in enumerate(("rows", "held.jsonl"))
    )
    made = tiny_run(
        folder / "base",
        rows,
        folder / "run",
        adapter={"r": 16, "lora_alpha": 32},
        data={"validation": held_out, "duplicates": "keep"},
        evaluate={"max_new_tokens": 8},
        train={"max_steps": 300, "learning_rate": 3e-3, "eval_steps": None},
    )
    veneer.train(made)
    assert losses(folder / "run", "eval")[-1] < 0.01, "it is sure of every answer, so that no rounding decides one"
    return folder / "run"
