"""Trackers: TensorBoard, Weights & Biases, trackio and MLflow get a run's records, each through its own client.

tracker.py   what a tracker is, and what it is told of a run
tracking.py  the listener that hands records to trackers, on threads of their own
process.py   a client in a process of its own

The others are one tracker each. A client is an extra (`pip install 'veneer[wandb]'`), imported when a run opens it.
"""

import importlib.util
from collections.abc import Sequence

from veneer.config.errors import UserError
from veneer.training.trackers.mlflow import MlflowTracker
from veneer.training.trackers.tensorboard import TensorBoardTracker
from veneer.training.trackers.tracker import Tracker
from veneer.training.trackers.trackio import TrackioTracker
from veneer.training.trackers.wandb import WandbTracker

# By the name in `train.report_to`, which is that of the client's package and of the extra too.
TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}


def require_trackers(names: Sequence[str]) -> None:
    """Raise UserError where clients of trackers are not installed."""
    absent = [name for name in dict.fromkeys(names) if importlib.util.find_spec(name) is None]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        raise UserError(
            f"train.report_to: {', '.join(absent)} {verb} not installed",
            f"pip install 'veneer[{','.join(absent)}]', or leave it out of train.report_to",
        )
