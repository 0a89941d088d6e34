"""Keeps the progress bars and standing notices of libraries off the screen while they load, and their advice after.

Real trouble is not hidden: what loading leaves uninitialised is read from its own report (load.py), and errors
pass through.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

NOISY = ("transformers", "bitsandbytes", "accelerate", "peft")
# Modules whose warnings are advice that does not apply here, given at any time: while bitsandbytes is imported by
# whatever needs it first, and in a forward pass. They log errors only; a program may set their levels back.
for _name in (
    "transformers.modeling_utils",  # rows are never padded on the left without a mask; pad and end may be one token
    "bitsandbytes.backends.cpu.ops",  # a kernel from a hub that is never fetched; the built-in one does the same
):
    logging.getLogger(_name).setLevel(logging.ERROR)


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
