"""Starts one process a GPU by torch's own launcher, and says which of them failed first.

It is what `torchrun --standalone --nproc-per-node N` does: torchelastic picks a free port, watches the processes,
hands signals on to them, and ends all where one has failed. Nothing is restarted: `--resume auto` under whatever starts
jobs again does that from a checkpoint. What is ours is the report: one line with the rank and its error.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torch's name of the file in which a process leaves its error
MONITOR_SECONDS = 0.2
LATE_SECONDS = 10  # after another one's end, more than a killed process is noticed in
SHUTDOWN_SECONDS = 600  # for the step and the checkpoint with which a stopped run ends


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m veneer` with some arguments in several processes; returns the exit status of them all.

    Args:
        processes: number of processes on this machine.
        arguments: arguments of the command line.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they say is said below
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # of the processes: errors of an exchange are raised, too
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        monitor_interval=MONITOR_SECONDS,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "veneer", *arguments)
    except ChildFailedError as error:
        return _report(error.failures)
    except SignalException:
        return 130
    return 0


def leave_error(message: str, is_consequence: bool) -> None:
    """Leave a rank's error for whoever started it.

    Args:
        message: the error.
        is_consequence: whether another rank's end is the reason.
    """
    if file := os.environ.get(ERROR_FILE):
        left = {"message": message, "timestamp": int(time.time()), "is_consequence": is_consequence}
        Path(file).write_text(json.dumps(left), encoding="utf-8")


def _report(failures: Mapping[int, Any]) -> int:
    """Print the error of the rank that failed first, unless it has done so itself; returns the exit status."""
    statuses = {failure.exitcode for failure in failures.values()}
    if 130 in statuses and not statuses & {1, 2, -SIGKILL}:
        return 130
    first = min(failure.timestamp for failure in failures.values())
    rank, failure = min(failures.items(), key=lambda item: _order(item[1], first))
    if failure.exitcode < 0:
        name = Signals(-failure.exitcode).name
        hint = ": the host may have run out of memory" if failure.exitcode == -SIGKILL else ""
        print(f"error: rank {rank} was ended by {name}{hint}; the run goes on from its last checkpoint with --resume",
              file=sys.stderr)  # fmt: skip
        return 1
    if rank != 0:
        print(f"error: rank {rank}: {failure.message}", file=sys.stderr)
    return 2 if failure.exitcode == 2 else 1


def _order(failure: Any, first: int) -> tuple[bool, bool, int]:
    """Sort key of a failure: one that is a cause comes first, and the earlier of two.

    Args:
        failure: torchelastic's record of it.
        first: time of the first failure of all.
    """
    # By the launcher, once another one had failed: a process that hangs does not end until it is killed.
    is_late = failure.timestamp - first > LATE_SECONDS
    is_ended = failure.exitcode == -SIGTERM or (failure.exitcode == -SIGKILL and is_late)
    return is_ended, bool(failure.error_file_data.get("is_consequence")), failure.timestamp
