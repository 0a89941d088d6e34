"""Runs a client in a process of its own, for those that print on standard output, ask for keys or hold an exit up.

The process gets lines of JSON, first what the run is and then its records. It ends once its input does, also where the
process that trains was killed; one that a run leaves behind goes on sending. What it prints is in trackers/NAME.log of
the run's folder.
"""

import json
import subprocess
import sys
from typing import Any

from veneer.training.trackers.tracker import TrackedRun


class ClientProcess:
    """The process of a client, which runs the function `main` of a module.

    Args:
        module: name of the module.
        name: name of the tracker.
        run: run that it is told of.
        first: first line.
    """

    def __init__(self, module: str, name: str, run: TrackedRun, first: dict[str, Any]) -> None:
        self._name, self._log = name, run.folder / f"{name}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {module} import main; main()"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the training
            )
        self.send(first)

    def send(self, line: dict[str, Any]) -> None:
        """Send a line; raises RuntimeError where the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"it has ended; see {self._log}") from None

    def close(self) -> None:
        """Wait for its end; raises RuntimeError where it failed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait():
            raise RuntimeError(f"it ended with an error; see {self._log}")
