"""Keeps lm-eval's log, bars and prints from the terminal, where Veneer shows progress of its own."""

import contextlib
import io
import logging
from collections.abc import Iterator

from veneer.model.quiet import quiet

NOISY = ("lm_eval", "lm-eval", "evaluate")


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Within the context, only errors of lm-eval are seen: those that it raises."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
