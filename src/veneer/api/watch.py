"""Follows a run that another process trains, by reading its files; nothing of the run is written or held up."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError
from veneer.config.run_folder import RunFolder
from veneer.config.tail import FollowedFile

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Look:
    """What a look at a run finds.

    Attributes:
        has_begun: whether the run's folder holds its settings.
        is_training: whether a process trains it.
        is_stopped: whether no process does, and it is not finished.
        records: records of metrics.jsonl that were not there at the look before.
        goes_on_from: step whose records are the last that still stand, where later ones were cut off, since the run
            was resumed or begun anew; else None.
        events: the same of events.jsonl.
    """

    has_begun: bool
    is_training: bool
    is_stopped: bool = False
    records: list[dict[str, Any]] = field(default_factory=list)
    goes_on_from: int | None = None
    events: list[dict[str, Any]] = field(default_factory=list)


def watch(run: str | Path, wait: bool = False, poll_seconds: float = POLL_SECONDS) -> Iterator[Look]:
    """Look at a run again and again, from before it begins until no process trains it.

    Example:
        for look in veneer.watch("runs/tickets"):
            print([record["loss"] for record in look.records])

    Args:
        run: the run's folder, which need not be there yet.
        wait: whether to go on when a run was stopped, until it is resumed and finished.
        poll_seconds: seconds between two looks.

    Raises:
        UserError: It is no folder.
    """
    folder = RunFolder(Path(run).expanduser())
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{run}: not a folder", "name the run's folder, its train.output_dir")
    metrics, events = FollowedFile(folder.metrics), FollowedFile(folder.events)
    try:
        while True:
            # In this order: a run begins and ends with its lock held, and all it writes comes between.
            has_begun = folder.run.exists()
            is_training = folder.is_held()
            is_over = has_begun and not is_training
            is_stopped = is_over and not folder.is_finished
            records, kept = metrics.read_new()
            step = None if kept is None else max((_step(record) for record in kept), default=0)
            news = list(filter(_is_record, records))
            yield Look(has_begun, is_training, is_stopped, news, step, events.read_new()[0])
            if is_over and not (wait and is_stopped):
                return
            time.sleep(poll_seconds)
    finally:
        metrics.close()
        events.close()


def _step(record: dict[str, Any]) -> int:
    return record["step"] if _is_record(record) else 0


def _is_record(record: dict[str, Any]) -> bool:
    """Whether it has what all records have."""
    if record.get("kind") == "eval":
        return isinstance(record.get("step"), int) and "loss" in record
    needed = ("loss", "tokens_per_second", "peak_bytes")
    return isinstance(record.get("step"), int) and all(isinstance(record.get(key), int | float) for key in needed)
