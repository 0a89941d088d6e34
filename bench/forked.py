"""Runs `veneer` commands in forks of a process that has imported everything, so that a try costs no imports.

The imports of Veneer take 5 to 20 seconds; a fork takes none of them. The names of the modules come from a first
process that does the work once. The parent trains nothing and never touches CUDA, which a fork could not use then:
modules that ask a GPU when they are imported (bitsandbytes) are left to the forks.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORKS = True  # where False, each command is a new process, which has to import all for itself
LIMIT_SECONDS = 240.0  # of a command; a hang is a failure
AT_IMPORT = ("bitsandbytes", "pynvml", "tests", "bench")  # not imported by the parent


def status_of(arguments: list[str]) -> int:
    """Run a command in this process; returns its exit status."""
    from veneer.__main__ import main

    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def import_what(arguments: list[str]) -> None:
    """Import, in this process, all that a command imports in a process of its own."""
    code = (
        "import json, sys; from bench.forked import status_of\n"
        "status = status_of(sys.argv[1:])\n"
        "print('\\n' + json.dumps([status, [*sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    status, names = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stdout
    import torch

    for name in names:
        if name.startswith((*AT_IMPORT, "_")) or "dynamic" in name:
            continue
        with contextlib.suppress(Exception):  # a module of another process may be none of this one
            importlib.import_module(name)
    assert not torch.cuda.is_initialized(), "a fork could not use the GPU"  # type: ignore[no-untyped-call]


def call(
    arguments: list[str],
    log: Path,
    prepare: Callable[[], None] | None = None,
    after: float | None = None,
    then: Callable[[int], Any] = lambda child: os.kill(child, signal.SIGKILL),
) -> int:
    """Run a command in a fork, or in a new process; returns its exit status, or less than 0: the signal that ended it.

    Args:
        arguments: Arguments of `veneer`.
        log: File that gets what it prints.
        prepare: Function that the fork calls first.
        after: Seconds after which `then` is called with the number of the process; None: never.
        then: By default, kills it.
    """
    if not FORKS:
        assert prepare is None, "only a fork can be prepared"
        with log.open("wb") as printed:
            command = [sys.executable, "-m", "veneer", *arguments]
            process = subprocess.Popen(command, stdout=printed, stderr=printed, start_new_session=True)
        return _ended(process.pid, after, then)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.setpgid(0, 0)
        status = 1
        try:
            import torch

            torch.set_num_threads(1)  # makes torch's thread pool anew after a fork: two threads at once fail at it
            if prepare is not None:
                prepare()
            os.write(writer, b"x")
            status = status_of(arguments)
        except KeyboardInterrupt:  # before the command's first line, where Python itself ends a process so
            print("start again with: the same command")
            status = 130
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return _ended(child, after, then)


def _ended(child: int, after: float | None, then: Callable[[int], Any]) -> int:
    """Wait for a process, as `call` says."""
    began, is_due = time.monotonic(), after is not None
    while True:
        ended, how = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(how)
        passed = time.monotonic() - began
        if is_due and passed >= (after or 0.0):
            is_due = False
            then(child)
        if passed > LIMIT_SECONDS:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGALRM
        time.sleep(0.002)


class Killer:
    """Counts what this process does to the file system, and kills it before the n-th change.

    Args:
        at: Number of the change; None: it only counts.
        counted: Descriptor that gets a byte for each; None: none does.
    """

    CHANGES = frozenset({"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"})  # names of audit events

    def __init__(self, at: int | None, counted: int | None = None) -> None:
        self.count, self._at, self._counted = 0, at, counted
        self._flush = os.fsync

    def install(self) -> None:
        """Begin to count, for the rest of this process, which is a fork made for it."""
        sys.addaudithook(self._hear)
        os.fsync = self._fsync  # no audit event tells of it

    def _hear(self, event: str, given: Any) -> None:
        if event in self.CHANGES or (
            event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            self._step()

    def _fsync(self, fd: Any) -> None:
        self._step()
        self._flush(fd)

    def _step(self) -> None:
        self.count += 1
        if self.count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._counted is not None:
            os.write(self._counted, b".")
