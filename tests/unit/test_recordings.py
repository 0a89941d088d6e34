"""Passes are recorded once they have run, and launched for good where that fails; on stand-ins for CUDA graphs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.support.notices import notified
from veneer.evaluation.recordings import Recordings


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to the stand-ins."""
    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replay")

        def pool(self) -> str:
            return "the pool"

    @contextmanager
    def graph(graph: Any, pool: Any) -> Iterator[None]:
        log.append(f"record in {pool}")
        try:
            yield
        except ValueError:
            raise RuntimeError("the recording was spoiled")  # noqa: B904 - as torch does, within the handling

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
    monkeypatch.setattr(torch.cuda, "set_stream", log.append)
    return log


def test_a_pass_is_launched_then_recorded_then_replayed(log: list[str]) -> None:
    recordings = Recordings(2)

    def launch() -> str:
        log.append("launch")
        return "logits"

    for _ in range(4):
        assert recordings.run("one", launch) == "logits"
    assert log == ["launch", "launch", "record in None", "launch", "replay", "replay"]
    log.clear()
    for _ in range(3):
        recordings.run("other", launch)
    assert log == ["launch", "launch", "record in the pool", "launch", "replay"]
    assert len(recordings) == 2
    recordings.clear()
    log.clear()
    recordings.run("one", launch)
    assert log == ["launch"]


def test_what_cannot_be_recorded_is_launched_each_time(log: list[str]) -> None:
    recordings, is_recording = Recordings(0), [True]

    def launch() -> str:
        log.append("launch")
        if is_recording[0]:
            is_recording[0] = False
            raise ValueError("a value was read")
        return "logits"

    with notified("launched each time, which is slower: a value was read"):
        assert recordings.run("one", launch) == "logits"
    assert recordings.run("other", launch) == "logits"
    assert log == ["record in None", "launch", "the stream", "launch", "launch"]
