"""Objectives that a run can minimize, one file each. `veneer.engine.objective.Objective` defines what one is."""

from veneer.engine.objective import Objective
from veneer.training.objectives.supervised import Supervised

OBJECTIVES: dict[str, Objective] = {
    "supervised": Supervised(),
}

__all__ = ["OBJECTIVES", "Supervised"]
