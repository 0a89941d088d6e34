"""Writes a run's checkpoints in a thread of its own, so that training waits for the copy off the device alone.

One checkpoint is written at a time: the next one waits for it. Old ones are deleted in the same thread, after the new
one is whole, so that the two never meet. A write that fails ends the run at its next step, with what was saved intact.

Where a copy would take more than half of the memory that is free, the state is written as it stands, and training
waits for all of it.
"""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from types import TracebackType

import psutil

from veneer.config import JobError
from veneer.config.folder import as_os_error
from veneer.machine.ranks import ALONE, Ranks
from veneer.training import checkpoint
from veneer.training.checkpoint import Snapshot, TrainingState

NAME = "veneer-checkpoint"  # of the thread

FULL = "free {size} on the disk of {folder}, or raise its quota"
LOCKED = "make {folder} writable again"
FIXES: dict[int | None, str] = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "allow files of {size} (`ulimit -f`)",
    errno.EROFS: LOCKED,
    errno.EACCES: LOCKED,
    errno.EPERM: LOCKED,
    errno.EIO: "see to the disk of {folder}, which fails to write",
}


class Saver:
    """Writes the checkpoints of a run; for a `with` block, which ends when all of them are on the disk.

    A second Ctrl-C (KeyboardInterrupt) leaves the block at once: what is half-written then never gets its name.

    Args:
        folder: Folder of the run's checkpoints.
        keep: Number of them that stay.
        ranks: This process among those of the run, of which the first alone writes.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks = ALONE) -> None:
        self._folder, self._keep, self._ranks = folder, keep, ranks
        self._thread: threading.Thread | None = None
        self._step: int | None = None  # of the checkpoint that is being written
        self._error: Exception | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            return
        self._join()
        if kind is None or not issubclass(kind, JobError):  # a job that fails says why itself
            self.check()

    def save(self, step: int, state: TrainingState, best: int | None, drops: bool = True) -> None:
        """Copy the state after `step` steps, and have it written.

        Args:
            step: Steps done.
            state: The state.
            best: Step whose checkpoint is never deleted; None: there is no such step.
            drops: Whether old checkpoints are deleted.

        Raises:
            JobError: The checkpoint before it could not be written.
        """
        if not self._ranks.is_first:
            return
        self.wait()
        size = state.bytes_of_copy()
        is_copied = size <= psutil.virtual_memory().available / 2
        snapshot = checkpoint.take(step, state, copies=is_copied)
        keep = self._keep if drops else None
        self._step = step
        if not is_copied:
            self._write(snapshot, keep, best)
            self.check()
            return
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._write, snapshot, keep, best), name=NAME, daemon=True
        )
        self._thread.start()

    def has(self, step: int) -> bool:
        """Return whether the checkpoint of a step is there, or is being written."""
        return self._ranks.first(
            lambda: step == self._step or checkpoint.path_of(self._folder, step).exists(),
        )

    def wait(self) -> None:
        """Wait until all is on the disk.

        Raises:
            JobError: It could not be written.
        """
        self._join()
        self.check()

    def check(self) -> None:
        """Raise JobError where a checkpoint could not be written."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def drop_old(self, best: int | None) -> None:
        """Delete all but the newest checkpoints, and that of the step `best`."""
        if not self._ranks.is_first:
            return
        self.wait()
        checkpoint.drop_old(self._folder, self._keep, best)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _write(self, snapshot: Snapshot, keep: int | None, best: int | None) -> None:
        try:
            path = checkpoint.path_of(self._folder, snapshot.step)
            with disk_errors_told(f"{path}: the checkpoint", snapshot.bytes, self._folder):
                checkpoint.write(self._folder, snapshot)
                if keep is not None:
                    checkpoint.drop_old(self._folder, keep, best)
        except Exception as error:  # noqa: BLE001 - it is raised where training next looks
            self._step, self._error = None, error


@contextmanager
def disk_errors_told(what: str, needed_bytes: int, checkpoints: Path) -> Iterator[None]:
    """Make an error of the disk within the block a JobError that says what is whole and what to do.

    Args:
        what: Name of the thing that is written.
        needed_bytes: Bytes that it takes.
        checkpoints: Folder of the run's checkpoints.
    """
    try:
        yield
    except Exception as error:
        reason = as_os_error(error)
        if reason is None or reason.errno not in FIXES:
            raise
        newest = checkpoint.newest(checkpoints)
        whole = "the run has no checkpoint yet" if newest is None else f"{newest} is intact, and the run goes on there"
        size = f"{max(1, round(needed_bytes / 2**20))} MiB"
        fix = FIXES[reason.errno].format(size=size, folder=checkpoints.parent)
        raise JobError(
            f"{what} could not be written ({reason.strerror}): {whole}\n"
            f"  fix: {fix}, then `veneer train {checkpoints.parent} --resume`"
        ) from error
