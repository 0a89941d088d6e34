"""What is said of processes that failed: the one that is the cause, and once."""

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
