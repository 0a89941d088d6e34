"""trackio: a local database, or the Space of TRACKIO_SPACE_ID; the project of TRACKIO_PROJECT."""

import json
import os
import secrets
import sys

from veneer.training.trackers.process import ClientProcess
from veneer.training.trackers.tracker import PROJECT, RunState, TrackedRun


class TrackioTracker:
    """A run of trackio, in a process of its own: it prints on standard output, which belongs to results."""

    @staticmethod
    def load() -> None:
        """Nothing is imported in this process."""

    def __init__(self, run: TrackedRun) -> None:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.id = run.id or f"{run.name}-{secrets.token_hex(2)}"  # trackio finds a run by its name alone
        self.where = f"trackio show --project {project}"
        first = {"project": project, "name": self.id, "config": run.about if run.id is None else None}
        self._client = ClientProcess(__name__, "trackio", run, first)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._client.send({"step": step, "values": values})

    def close(self, state: RunState) -> None:
        self._client.close()


def main() -> None:
    """Log the lines of standard input."""
    import trackio

    first = json.loads(sys.stdin.readline())
    run = trackio.init(**first, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    for line in sys.stdin:
        record = json.loads(line)
        run.log(record["values"], step=record["step"])
    run.finish()
