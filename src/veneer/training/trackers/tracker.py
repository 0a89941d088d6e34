"""Defines what a tracker is, and the run that it is told of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

# How the training ended.
RunState = Literal["finished", "interrupted", "failed"]
PROJECT = "veneer"  # where a client's own environment variable names no project


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it.

    Attributes:
        name: name of the run, that of its folder.
        folder: folder for files of the tracker, in the run's folder.
        id: the tracker's name of the run, which an earlier process kept; None: the tracker does not know it yet.
        step: step before the first record.
        about: settings, plan and ledger, by the names of their files; without paths and rows.
    """

    name: str
    folder: Path
    id: str | None
    step: int
    about: dict[str, dict[str, Any]]


class Tracker(Protocol):
    """A run that is open in a tracker; it lives on a thread of its own (`tracking.py`), which may wait and fail.

    Attributes:
        id: the tracker's name of the run.
        where: address at which a person sees it, or a command that shows it.
    """

    id: str
    where: str

    @staticmethod
    def load() -> None:
        """Import the client; called before the training, which an import on another thread would slow down."""
        ...

    def __init__(self, run: TrackedRun) -> None:
        """Open the run; one without an id is made, and told what it is."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of one record."""
        ...

    def close(self, state: RunState) -> None:
        """Send what is left, and say how the training ended."""
        ...


def values_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record of metrics.jsonl under names such as train/loss; no lists, no null."""
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def flat(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested settings as section.key: value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, dict) and value else {f"{before}{key}": value}
    return found
