"""Keeps the progress bars and standing notices of libraries off the screen while they load.

Real trouble is not hidden: what loading leaves uninitialised is read from its own report (load.py), and errors
pass through.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

NOISY = ("transformers", "bitsandbytes", "accelerate", "peft")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, libraries log errors only, warn of nothing, and draw no bars."""
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
