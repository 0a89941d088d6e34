"""`notify()`, the one way to tell a person something: a line on standard error, once, kept in the run's events.jsonl.

Results, progress and the error that ends a command are printed by whoever has them; all else that a person must know
goes through here. Of several processes of one run, the first alone speaks.

What was said has to reach the run's folder although most of it is said before the folder exists, by code (a loader, a
cache) that knows of no run. A sink passed down would stand in every signature between the command and that code; a
context variable belongs to the call that set it, is put back when that call ends, and is no state of the process. Where
no block collects, as in a single call from Python, `notify` prints and keeps nothing.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from veneer.config.files import visible

Level = Literal["info", "warning"]


@dataclass(frozen=True)
class Event:
    """What a person was told: a line of events.jsonl.

    Attributes:
        time: When, UTC, ISO 8601.
        level: info or warning.
        message: The text.
        where: The setting, file or folder that it is about; empty: the run.
    """

    time: str
    level: Level
    message: str
    where: str


class Notices:
    """What was said within a block.

    Args:
        outer: The block around this one, which hears all that is said in this one.
        said: Messages that were printed.
        file: The file that keeps what is said; None: it is kept for a file to come.

    Attributes:
        events: All that was said.
        outer: As given.
    """

    def __init__(self, outer: "Notices | None", said: set[str], file: Path | None = None) -> None:
        self.events: list[Event] = []
        self.said = said
        self.outer, self._file = outer, file
        self._unwritten: list[Event] = []

    def add(self, event: Event, is_written: bool = False) -> None:
        """Keep an event, here and in the blocks around; the innermost file is the one that it is written to."""
        self.events.append(event)
        if not is_written:
            self._unwritten.append(event)
            self._write()
        if self.outer is not None:
            self.outer.add(event, is_written or self._file is not None)

    def take_over(self, other: "Notices") -> None:
        """Write what another block could not write yet."""
        self._unwritten, other._unwritten = other._unwritten, []
        self._write()

    def _write(self) -> None:
        if self._file is None or not self._unwritten:
            return
        with contextlib.suppress(OSError):  # the disk may be full for a moment: the next event takes these along
            with self._file.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(asdict(event), ensure_ascii=False) + "\n" for event in self._unwritten))
            self._unwritten = []


_CURRENT: ContextVar[Notices | None] = ContextVar("notices", default=None)


def notify(message: str, level: Level = "warning", where: str = "") -> None:
    """Tell a person something; on ranks other than 0, and where the same was said before in the block, print nothing.

    Args:
        message: What to say: one sentence, or a sentence and indented lines.
        level: `warning`: something may be wrong; `info`: what is being done and why it takes a while.
        where: The setting, file or folder that it is about.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    notices = _CURRENT.get()
    if notices is None or message not in notices.said:
        print(visible(f"warning: {message}" if level == "warning" else message), file=sys.stderr)
    if notices is not None:
        notices.said.add(message)
        notices.add(Event(datetime.now(UTC).isoformat(timespec="seconds"), level, message, where))


def notify_on_error(what: str, write: Callable[[], None]) -> None:
    """Write what a result is good without; where that fails, say so and keep the result."""
    try:
        write()
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the adapter
        notify(f"{what} could not be written ({type(error).__name__}: {error}); all else is there", where=what)


@contextlib.contextmanager
def collected() -> Iterator[Notices]:
    """Collect what is said within the block, and print each message once; a command is one such block."""
    with _current(Notices(_CURRENT.get(), set())) as notices:
        yield notices


@contextlib.contextmanager
def kept_in(file: Path) -> Iterator[None]:
    """Append what is said within the block to a file, after what the block around it has said so far.

    Args:
        file: events.jsonl of a run whose folder exists.
    """
    outer = _CURRENT.get()
    with _current(Notices(outer, set() if outer is None else outer.said, file)) as notices:
        if outer is not None:
            notices.take_over(outer)
        yield


@contextlib.contextmanager
def _current(notices: Notices) -> Iterator[Notices]:
    token = _CURRENT.set(notices)
    try:
        yield notices
    finally:
        _CURRENT.reset(token)
