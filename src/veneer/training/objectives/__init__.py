"""What a run minimizes: a file an objective. `veneer.engine.objective.Objective` says what one is."""

from veneer.engine.objective import Objective
from veneer.training.objectives.supervised import Supervised

OBJECTIVES: dict[str, Objective] = {
    "supervised": Supervised(),
}

__all__ = ["OBJECTIVES", "Supervised"]
