"""Weights & Biases: the project of WANDB_PROJECT; offline with WANDB_MODE=offline."""

import json
import os
import secrets
import sys

from veneer.training.trackers.process import ClientProcess
from veneer.training.trackers.tracker import PROJECT, RunState, TrackedRun


class WandbTracker:
    """A run of Weights & Biases, in a process of its own: the client asks for a key, and holds up the exit.

    Of itself it would also send the terminal's output, the Git state and the command line, which may be private.
    """

    @staticmethod
    def load() -> None:
        """Nothing is imported in this process."""

    def __init__(self, run: TrackedRun) -> None:
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.id = run.id or secrets.token_hex(8)
        self.where = f"run {self.id} of the project {project}; its address is in {run.folder / 'wandb.log'}"
        first = {
            "project": project,
            "name": run.name,
            "id": self.id,
            "dir": str(run.folder),
            "config": run.about if run.id is None else None,
        }
        self._client = ClientProcess(__name__, "wandb", run, first)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._client.send(values | {"step": step})

    def close(self, state: RunState) -> None:
        self._client.send({"state": state})
        self._client.close()


def main() -> None:
    """Log the lines of standard input; one that was not told how the run ended says that it failed."""
    import wandb

    first = json.loads(sys.stdin.readline())
    settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True)
    run = wandb.init(**first, resume="allow", settings=settings)
    # A resumed run repeats steps, and W&B's own counter of steps never goes back.
    run.define_metric("*", step_metric="step")
    state = "failed"
    for line in sys.stdin:
        record = json.loads(line)
        if "state" in record:
            state = record["state"]
        else:
            run.log(record)
    run.finish(exit_code=0 if state == "finished" else 1)
