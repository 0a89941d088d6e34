"""What a run minimizes: a file an objective, which is a `TrainingObjective`."""

from typing import Protocol

from veneer.engine.objective import Objective
from veneer.training.objectives.supervised import Supervised


class TrainingObjective(Objective, Protocol):
    def held_out_metrics(self, loss: float) -> dict[str, float | None]:
        """What is logged beside the mean loss of held-out rows, which may be no finite number."""
        ...


OBJECTIVES: dict[str, TrainingObjective] = {
    "supervised": Supervised(),
}
