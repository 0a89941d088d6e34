"""Handles signals that stop a training: the loop ends after its step, with a checkpoint.

Ctrl-C, SIGTERM and a terminal that was closed (SIGHUP) do the same. Signals that the caller
ignores stay ignored, as `nohup` has it.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
IMPATIENT_SECONDS = 1.0  # after the first Ctrl-C, before which another is the same one: a key bounces, a shell repeats


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether a stop was asked for; a second Ctrl-C, a while later, stops at once."""
    asked: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(number: int, frame: object) -> None:
        now = time.monotonic()
        if asked and number == signal.SIGINT and now - asked[0] > IMPATIENT_SECONDS:
            raise KeyboardInterrupt
        asked.append(now)

    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, ask) for number in heard}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
