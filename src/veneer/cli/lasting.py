"""A command outlives its terminal: output that is gone does not end it, and SIGTERM ends it as Ctrl-C does.

A reader that went away (`| head`), a terminal that was closed or a full disk behind standard output are no reason to
lose a training: what would have been printed goes nowhere from there on. Results that were asked for on standard output
and did not get out are status 1, unless the reader itself went away.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LEFT = (errno.EPIPE, errno.EIO)  # the reader went away, the terminal was closed


class Lasting:
    """A text stream that drops all that is written after its first error, and raises nothing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, as a file does."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flush, as a file does."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        self.error = error
        # The descriptor itself, so that what waits in buffers, here or in a library, goes nowhere as well.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


class Output:
    """Standard output and error of a command, made lasting."""

    def __init__(self) -> None:
        self.before = (sys.stdout, sys.stderr)
        self.streams = [None if stream is None else Lasting(stream) for stream in self.before]

    def status(self) -> int:
        """Return 1 where results were lost for another reason than that nobody reads them any more."""
        out, err = self.streams
        if out is None:
            return 0
        out.flush()
        if out.error is None or out.error.errno in LEFT:
            return 0
        print(f"error: standard output could not be written ({out.error.strerror})", file=err)
        return 1


@contextmanager
def lasting_output() -> Iterator[Output]:
    """Make standard output and error outlast what reads them, for a `with` block."""
    output = Output()
    sys.stdout, sys.stderr = output.streams
    try:
        yield output
    finally:
        for stream in output.streams:
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = output.before


@contextmanager
def polite_kills() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, with nothing half-written; ignored signals stay ignored."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {
        number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
