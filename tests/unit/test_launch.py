"""What is said of several processes: of those that failed the one that is the cause, and what they cannot share."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from veneer.machine.launch import _report


def failure(exitcode: int, timestamp: int, message: str = "", is_consequence: bool = False) -> Any:
    data = {"is_consequence": is_consequence}
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, message=message, error_file_data=data)


@pytest.mark.parametrize(
    ("failures", "status", "said"),
    [
        ({0: failure(1, 100, "broke off", True), 1: failure(-9, 100)}, 1, "rank 1 was ended by SIGKILL"),
        ({0: failure(-15, 101), 1: failure(-9, 100)}, 1, "rank 1 was ended by SIGKILL"),
        ({0: failure(-15, 101), 1: failure(1, 100, "no memory")}, 1, "rank 1: no memory"),
        # The first process has said it itself: that another one hangs, which is then killed, or what is wrong.
        ({0: failure(1, 100, "rank 1 is not here", True), 1: failure(-9, 130)}, 1, ""),
        ({0: failure(2, 100, "bad"), 1: failure(-15, 100)}, 2, ""),
        ({0: failure(130, 100), 1: failure(130, 100)}, 130, ""),
    ],
    ids=["killed", "killed, and the others ended", "an error", "hangs", "a wrong setting", "stopped"],
)
def test_the_cause_is_named_once(
    failures: dict[int, Any], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _report(failures) == status
    error = capsys.readouterr().err
    assert said in error
    assert bool(error) == bool(said)


EVALUATE = ("evaluate", ".", "--data", "rows.jsonl", "--gpus", "2", "--against")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*EVALUATE, "model.gguf"), "run by llama.cpp"),
        ((*EVALUATE, "http://localhost:1"), "is on a server"),
        (("generate", ".", "--gpus", "2"), "cannot read standard input"),
    ],
    ids=["gguf", "server", "standard input"],
)
def test_what_several_processes_cannot_share_is_refused(
    arguments: tuple[str, ...],
    said: str,
    call: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    status, _, error = call(*arguments)
    assert status == 2
    assert "--gpus 2: " in error
    assert said in error


def test_a_command_for_one_process_says_so_under_torchrun(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = call("merge", "run", "--out", "merged")
    assert status == 2
    assert "`veneer merge` runs in one process, and torchrun has started several" in error
