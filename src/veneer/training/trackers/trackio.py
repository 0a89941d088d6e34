"""trackio: a local database, or the Space of TRACKIO_SPACE_ID; the project of TRACKIO_PROJECT.

trackio prints on standard output, which belongs to results, and cannot be told not to. It runs in a process of its own,
which gets lines of JSON and ends once its input does, also where the process that trains was killed. What it prints is in
trackers/trackio.log of the run's folder.
"""

import json
import os
import secrets
import subprocess
import sys
from typing import Any

from veneer.training.trackers.tracker import PROJECT, RunState, TrackedRun


class TrackioTracker:
    """A run of trackio; see `Tracker`."""

    @staticmethod
    def load() -> None:
        """Nothing is imported in this process."""

    def __init__(self, run: TrackedRun) -> None:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.id = run.id or f"{run.name}-{secrets.token_hex(2)}"  # trackio finds a run by its name alone
        self.where = f"trackio show --project {project}"
        self._log = run.folder / "trackio.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the training
            )
        self._send({"project": project, "name": self.id, "config": run.about if run.id is None else None})

    def log(self, step: int, values: dict[str, float]) -> None:
        self._send({"step": step, "metrics": values})

    def close(self, state: RunState) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait():
            raise RuntimeError(f"trackio ended with an error; see {self._log}")

    def _send(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"trackio has ended; see {self._log}") from None


def main() -> None:
    """Log the lines of standard input."""
    import trackio

    first = json.loads(sys.stdin.readline())
    run = trackio.init(
        project=first["project"],
        name=first["name"],
        config=first["config"],
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    for line in sys.stdin:
        record = json.loads(line)
        run.log(record["metrics"], step=record["step"])
    run.finish()


if __name__ == "__main__":
    main()
