"""Suppresses progress bars and routine notices of libraries while they load, and their advice afterwards.

Real problems are not hidden: missing weights are read from the loader's own report (load.py), and errors pass through.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

NOISY = ("transformers", "bitsandbytes", "accelerate", "peft")
# Modules whose warnings are advice that does not apply here, given at any time: while bitsandbytes is imported, and in
# a forward pass. They log errors only; a program may reset their levels.
for _name in (
    "transformers.modeling_utils",  # rows are never left-padded without a mask; pad and end may be one token
    "bitsandbytes.backends.cpu.ops",  # a kernel from a hub that is never fetched; the built-in one does the same
):
    logging.getLogger(_name).setLevel(logging.ERROR)


class _Silence:
    """What is silenced while any thread asks for it: the levels, filters and bars are those of the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._restore = contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._restore.enter_context(_silenced())

    def leave(self) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._restore.close()


_SILENCE = _Silence()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the context, libraries log errors only, without warnings and progress bars; in all threads."""
    _SILENCE.enter()
    try:
        yield
    finally:
        _SILENCE.leave()


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
