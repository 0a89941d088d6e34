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

    class Stream:
        device_index = 0

    @contextmanager
    def graph(graph: Any, pool: Any) -> Iterator[None]:
        log.append(f"capture into {pool}")
        try:
            yield
        except ValueError:
            raise RuntimeError("the recording was spoiled")  # noqa: B904 - as torch does, within the handling

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)

    def end(device: int, pool: str) -> None:
        log.append(f"end capture into {pool}")
        raise RuntimeError("not currently recording")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: log.append("the stream"))
    monkeypatch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", end)
    return log


def test_a_pass_is_launched_then_recorded_then_replayed(log: list[str]) -> None:
    recordings = Recordings(2)

    def launch() -> str:
        log.append("launch")
        return "logits"

    for _ in range(4):
        assert recordings.run("one", launch) == "logits"
    assert log == ["launch", "launch", "capture into the pool", "launch", "replay", "replay"]
    log.clear()
    for _ in range(3):
        recordings.run("other", launch)
    assert log == ["launch", "launch", "capture into the pool", "launch", "replay"]
    assert list(recordings) == ["one", "other"]
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
    tried = ["capture into the pool", "launch", "the stream", "end capture into the pool", "launch"]
    assert log == [*tried, "launch"]
    recordings.clear()
    log.clear()
    assert recordings.run("one", launch) == "logits"
    assert log == ["capture into the pool", "launch", "replay"], "what spoiled it may be over"
