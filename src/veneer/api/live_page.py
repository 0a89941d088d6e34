"""Keeps report.html up to date while a run trains, and never stands in its way.

A page takes some tens of milliseconds and the disk's time, so it is written by a thread, one page at a time: at most
every REFRESH_SECONDS, and so seldom that all of it stays below 0.5% of the run. The thread reads the run's files as
`veneer report` does, and touches nothing of the training. What fails there is told once, at the next record.

Of several processes of one run, the first alone writes.
"""

import os
import time
from threading import Thread
from types import TracebackType
from typing import Any

from veneer.config import RunFolder
from veneer.config.files import reason
from veneer.config.notify import kept_in, notify, notify_on_error
from veneer.report.run_page import REFRESH_SECONDS, write_run_page

FIRST_SECONDS = 3.0  # before the first page: a run that is over by then has one, its last
MOST_SHARE = 0.005  # of the time, for pages
JOIN_SECONDS = 10.0  # that the end of a run waits for a page that is being written


def renew_page(folder: RunFolder) -> None:
    """Write the page of a run anew, with what was measured since; where that fails, what was measured stays."""

    def write() -> None:
        write_run_page(folder)

    notify_on_error("report.html", write)


class LivePage:
    """A listener that has the page of a run written; for a `with` block around training.

    At the end of the block it is written once more, with the state that the run is left in.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._is_first = os.environ.get("RANK", "0") == "0"
        self._thread: Thread | None = None
        self._due = time.monotonic() + FIRST_SECONDS
        self._wait: float = REFRESH_SECONDS
        self._error = ""
        self._has_told = False
        self._has_begun = False

    def __enter__(self) -> "LivePage":
        return self

    def __call__(self, record: dict[str, Any]) -> None:
        if not self._is_first:
            return
        self._has_begun = True
        if self._error:
            self._tell()
        if time.monotonic() >= self._due and (self._thread is None or not self._thread.is_alive()):
            self._due = time.monotonic() + self._wait
            self._thread = Thread(target=self._write, name="veneer-report", daemon=True)
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._has_begun:  # nothing was trained here, or another process holds the run
            return
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)
            if self._thread.is_alive():
                return
        self._write()
        if self._error:
            with kept_in(self._folder.events):
                self._tell()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            write_run_page(self._folder, self._wait)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the run
            self._error = f"{type(error).__name__}: {reason(error)}"
        self._wait = max(REFRESH_SECONDS, (time.monotonic() - began) / MOST_SHARE)
        self._due = max(self._due, began + self._wait)

    def _tell(self) -> None:
        if not self._has_told:
            notify(f"report.html could not be written ({self._error}); all else is there", where="report.html")
        self._has_told, self._error = True, ""
