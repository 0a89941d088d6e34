"""Weights & Biases: the project of WANDB_PROJECT; offline with WANDB_MODE=offline."""

import os
import secrets

from veneer.training.trackers.tracker import PROJECT, RunState, TrackedRun


class WandbTracker:
    """A run of Weights & Biases.

    Of itself the client would also send the terminal's output, the Git state and the command line, and ask for a key on
    the terminal: what a person was told is in the run's events.jsonl, and the rest may be private.
    """

    @staticmethod
    def load() -> None:
        import wandb  # noqa: F401

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self.id = run.id or secrets.token_hex(8)
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_meta=True, reinit="create_new"
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=self.id,
            resume="allow",
            dir=run.folder,
            config=run.about if run.id is None else None,
            settings=settings,
        )
        # A resumed run repeats steps, and W&B's own counter of steps never goes back.
        self._run.define_metric("*", step_metric="step")
        self.where = f"wandb sync {self._run.settings.sync_dir}" if self._run.offline else str(self._run.url)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values | {"step": step})

    def close(self, state: RunState) -> None:
        self._run.finish(exit_code=0 if state == "finished" else 1)
