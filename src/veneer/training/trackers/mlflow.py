"""MLflow: the store that MLFLOW_TRACKING_URI names, in the experiment of MLFLOW_EXPERIMENT_NAME."""

import os
import time

from veneer.training.trackers.tracker import PROJECT, RunState, TrackedRun, flat

ENDED = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
PARAMS = 100  # of one request; the client refuses more
LONGEST = 6000  # characters of a parameter


class MlflowTracker:
    """A run of MLflow, by its client, which unlike `mlflow.log_metric` has no current run of the process."""

    @staticmethod
    def load() -> None:
        import mlflow  # noqa: F401

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient()
        if run.id is not None:
            self.id = run.id
            client.update_run(self.id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = client.get_experiment_by_name(name)
            number = client.create_experiment(name) if experiment is None else experiment.experiment_id
            self.id = client.create_run(number, run_name=run.name).info.run_id
            params = [Param(key, str(value)[:LONGEST]) for key, value in flat(run.about["run.yaml"]).items()]
            for first in range(0, len(params), PARAMS):
                client.log_batch(self.id, params=params[first : first + PARAMS])
            for file, content in run.about.items():
                client.log_dict(self.id, content, file)
        self.where = f"run {self.id} of MLflow"

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self, state: RunState) -> None:
        self._client.set_terminated(self.id, ENDED[state])
