"""Hands a run's records to its trackers without ever waiting for one.

A tracker has a thread of its own, on which it is opened, gets its records and is closed, and a bounded queue before it.
The background modes of the clients would not do: `wandb.init` and each call of MLflow wait for a server, TensorBoard's
writer waits where its queue is full, and an exception in any of them would end the training. A full queue drops
records, a tracker that fails loses what it failed at, and one that does not end in time is left behind with its thread,
which does not keep the process. Each is said once for a tracker, by the thread that trains: `notify` knows its context.
metrics.jsonl has all records in any case.

A thread of Python takes the interpreter's lock for what it computes. A record is a few dozen numbers.
"""

import os
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Thread
from types import TracebackType
from typing import Any, Literal

from veneer.config import Interrupted, RunFolder
from veneer.config.files import read_json
from veneer.config.folder import make_folder, write_json
from veneer.config.notify import kept_in, notify
from veneer.training.metrics import read_metrics
from veneer.training.trackers import TRACKERS
from veneer.training.trackers.tracker import RunState, TrackedRun, values_of

MOST_WAITING = 1000  # records before a tracker
CLOSE_SECONDS = 10.0  # that the end of a run waits for all its trackers together
_SECRET_NAME = re.compile("key|token|password|secret", re.IGNORECASE)
Level = Literal["info", "warning"]


class Tracking:
    """A listener that passes records on to trackers, opened at the first of them; for a `with` block around training.

    Args:
        names: names of the trackers, as in `train.report_to`.
        folder: folder of the run.
        describe: function that returns what trackers are told of the run (`TrackedRun.about`).
    """

    def __init__(
        self, names: Sequence[str], folder: RunFolder, describe: Callable[[], dict[str, dict[str, Any]]]
    ) -> None:
        is_first = os.environ.get("RANK", "0") == "0"  # of the processes of one run
        self._names = tuple(dict.fromkeys(names)) if is_first else ()
        self._folder, self._describe = folder, describe
        self._trackers: list[_Background] | None = None

    def __enter__(self) -> "Tracking":
        for name in self._names:
            with suppress(Exception):  # opening it fails alike, and says so
                TRACKERS[name].load()
        return self

    def __call__(self, record: dict[str, Any]) -> None:
        if self._trackers is None:
            self._trackers = self._open(record)
        for tracker in self._trackers:
            tracker.put(record)
            tracker.tell()

    def _open(self, record: dict[str, Any]) -> "list[_Background]":
        if not self._names:
            return []
        earlier = [one for one in read_metrics(self._folder.metrics) if one != record]
        about = self._describe()
        make_folder(self._folder.trackers)
        return [_Background(name, self._folder, about, earlier) for name in self._names]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._trackers:
            return
        state: RunState = "finished"
        if kind is not None:
            state = "interrupted" if issubclass(kind, Interrupted | KeyboardInterrupt) else "failed"
        deadline = time.monotonic() + CLOSE_SECONDS
        for tracker in self._trackers:
            tracker.end(state)
        with kept_in(self._folder.events):
            for tracker in self._trackers:
                tracker.join(deadline)


class _Background:
    """A tracker on a thread of its own.

    Args:
        name: name of the tracker.
        folder: folder of the run.
        about: settings, plan and ledger; see `TrackedRun`.
        earlier: records before the first, for a tracker that a resumed run is new to.
    """

    def __init__(
        self, name: str, folder: RunFolder, about: dict[str, dict[str, Any]], earlier: Sequence[dict[str, Any]]
    ) -> None:
        self._name, self._earlier = name, earlier
        self._id_file = folder.trackers / f"{name}.json"
        run_id = read_json(self._id_file, "id")["id"] if self._id_file.exists() else None
        step = max((record["step"] for record in earlier), default=0)
        self._run = TrackedRun(folder.path.absolute().name, folder.trackers, run_id, step, about)
        self._queue: Queue[dict[str, Any] | RunState] = Queue(MOST_WAITING)
        self._messages: deque[tuple[Level, str]] = deque()
        self._has_warned = False
        self._end: RunState | None = None
        self._thread = Thread(target=self._work, name=f"veneer-{name}", daemon=True)
        self._thread.start()

    def put(self, record: dict[str, Any]) -> None:
        """Hand on a record, or drop it; called by the thread that trains."""
        try:
            self._queue.put_nowait(dict(record))
        except Full:
            if self._thread.is_alive():  # else it has said why not
                self._warn("does not keep up, and some records are left out there")

    def tell(self) -> None:
        """Notify of what happened on the thread; of warnings, the first."""
        while self._messages:
            level, message = self._messages.popleft()
            if level == "info" or not self._has_warned:
                notify(f"train.report_to: {self._name}{message}", level, "train.report_to")
            self._has_warned |= level == "warning"

    def end(self, state: RunState) -> None:
        """Have it closed once it has all records."""
        self._end = state
        with suppress(Full):  # the thread looks at `_end` when it has emptied the queue
            self._queue.put_nowait(state)

    def join(self, deadline: float) -> None:
        """Wait until it is closed, or the time has come."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"did not take all records within {CLOSE_SECONDS:.0f} s of the end, and is left behind")
        self.tell()

    def _warn(self, what: str) -> None:
        self._messages.append(("warning", f" {what}; the run goes on, and metrics.jsonl has all records"))

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self._name](self._run)
            if self._run.id is None:
                write_json(self._id_file, {"id": tracker.id})
        except Exception as error:  # noqa: BLE001 - whatever a client raises, the training goes on
            self._warn(f"could not be opened ({_describe(error)})")
            return
        self._messages.append(("info", f": {tracker.where}"))
        for earlier in self._earlier if self._run.id is None else ():
            self._log(tracker, earlier)
        while isinstance(record := self._next(), dict):
            self._log(tracker, record)
        try:
            tracker.close(record)
        except Exception as error:  # noqa: BLE001
            self._warn(f"could not be closed ({_describe(error)})")

    def _next(self) -> dict[str, Any] | RunState:
        """Return the next record, or how the run ended, once no record is left."""
        while True:
            try:
                return self._queue.get(timeout=1)
            except Empty:
                if self._end is not None:
                    return self._end

    def _log(self, tracker: Any, record: dict[str, Any]) -> None:
        try:
            tracker.log(record["step"], values_of(record))
        except Exception as error:  # noqa: BLE001
            self._warn(f"did not take step {record['step']} ({_describe(error)})")


def _describe(error: Exception) -> str:
    """Return the first line of a client's error, without secrets of the environment or of an address."""
    text = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return re.sub(r"://[^/\s@]+@", "://***@", text)[:300]
