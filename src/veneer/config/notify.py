"""`notify()`, the one way to tell a person something: a line on standard error, once, kept in the run's events.jsonl.

Results, progress and the error that ends a command are printed by whoever has them; all else that a person must know
goes through here. Of several processes of one run, the first alone speaks.

Most is said before the run's folder exists, by code (a loader, a cache) that knows of no run. A sink passed down would
stand in every signature between the command and that code; a context variable belongs to the call that set it, is put
back when that call ends, and is no state of the process. Where no block collects, `notify` prints and keeps nothing.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from veneer.config.errors import Interrupted
from veneer.config.files import visible


class Notices:
    """What was said within a block.

    Attributes:
        events: All that was said, as lines of events.jsonl: time (UTC), level, message, where.
        said: Messages that were printed.
        file: The file that keeps what is said; None: it waits for one.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, str]] = []
        self.said: set[str] = set()
        self.file: Path | None = None
        self._unwritten = ""

    def add(self, event: dict[str, str]) -> None:
        """Keep an event, in the file where there is one."""
        self.events.append(event)
        self._unwritten += json.dumps(event, ensure_ascii=False) + "\n"
        self.write()

    def write(self) -> None:
        """Append what is not written yet; where that fails, a later event takes it along."""
        if self.file is not None and self._unwritten:
            with suppress(OSError), self.file.open("a", encoding="utf-8") as file:
                file.write(self._unwritten)
                self._unwritten = ""


_CURRENT: ContextVar[Notices | None] = ContextVar("notices", default=None)


def notify(message: str, level: Literal["info", "warning"] = "warning", where: str = "") -> None:
    """Notify a person; ranks other than 0 are silent, and a context does not print the same message twice.

    Args:
        message: one sentence, or a sentence and indented lines.
        level: `warning`: something may be wrong; `info`: what is being done and why it takes a while.
        where: setting, file or folder that it is about.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    notices = _CURRENT.get()
    if notices is None or message not in notices.said:
        print(visible(f"warning: {message}" if level == "warning" else message), file=sys.stderr)
    if notices is not None:
        notices.said.add(message)
        notices.add(_event(level, message, where))


def notify_on_error(what: str, write: Callable[[], None]) -> None:
    """Write what a result is good without; where that fails, say so and keep the result."""
    try:
        write()
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the adapter
        notify(f"{what} could not be written ({type(error).__name__}: {error}); all else is there", where=what)


@contextmanager
def collected() -> Iterator[Notices]:
    """Collect what is said within the block, as a command does; a block within another one joins it."""
    if (notices := _CURRENT.get()) is not None:
        yield notices
        return
    notices = Notices()
    token = _CURRENT.set(notices)
    try:
        yield notices
    finally:
        _CURRENT.reset(token)


@contextmanager
def kept_in(file: Path) -> Iterator[None]:
    """Append what is said within the block, and what was said before it, to a run's events.jsonl.

    So is the error that ends the block, as level `error`; whoever ends the command prints it.
    """
    with collected() as notices:
        before, notices.file = notices.file, file
        notices.write()
        try:
            yield
        except Exception as error:
            if not isinstance(error, Interrupted) and os.environ.get("RANK", "0") == "0":
                notices.add(_event("error", str(error) or type(error).__name__))
            raise
        finally:
            notices.file = before


def _event(level: str, message: str, where: str = "") -> dict[str, str]:
    """Return a line of events.jsonl."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"time": time, "level": level, "message": message, "where": where}
