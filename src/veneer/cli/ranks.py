"""The option --gpus: a command runs itself again in as many processes, by torch's launcher."""

import os
import sys


def run_on(gpus: int | None) -> None:
    """Run this command in as many processes as GPUs, and end with their status; where one will do, do nothing.

    Raises:
        UserError: this machine has fewer GPUs.
    """
    if gpus is None or gpus == 1:
        return
    from veneer.cli import checks
    from veneer.machine.launch import launch

    checks.require_gpus(gpus)
    given = sys.argv[1:]
    at = next(n for n, word in enumerate(given) if word == "--gpus" or word.startswith("--gpus="))
    # Whatever the status is, the processes have said why.
    raise SystemExit(launch(gpus, given[:at] + given[at + (2 if given[at] == "--gpus" else 1) :]))


def is_first() -> bool:
    """Return whether this process is the one that writes and prints: alone, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> None:
    """End the exchange with other processes, where there are any."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from veneer.machine.ranks import leave_ranks

        leave_ranks()
