"""TensorBoard: event files in the run's folder."""

import json

from veneer.training.trackers.tracker import RunState, TrackedRun


class TensorBoardTracker:
    """A run's event files, written by torch; see `Tracker`."""

    @staticmethod
    def load() -> None:
        import torch.utils.tensorboard  # noqa: F401

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = "tensorboard"
        folder = run.folder / self.id
        self.where = f"tensorboard --logdir {folder}"
        # Of what a killed process logged after its checkpoint, only what is made again is shown.
        self._writer = SummaryWriter(str(folder), purge_step=None if run.id is None else run.step + 1)
        if run.id is None:
            for name, content in run.about.items():
                text = json.dumps(content, indent=2, ensure_ascii=False)
                self._writer.add_text(name, f"```json\n{text}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, state: RunState) -> None:
        self._writer.close()
