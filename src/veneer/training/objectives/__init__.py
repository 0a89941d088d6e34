"""Objectives that a run can minimize, one file each. `veneer.engine.objective.Objective` defines what one is."""

from collections.abc import Callable

from veneer.config import Dpo, Train
from veneer.engine.objective import Objective
from veneer.training.objectives.dpo import DirectPreference
from veneer.training.objectives.supervised import Supervised

# By the names of `train.objective`.
OBJECTIVES: dict[str, Callable[[Train], Objective]] = {
    "sft": lambda train: Supervised(),
    "dpo": lambda train: DirectPreference.of(train.dpo or Dpo()),
}

__all__ = ["OBJECTIVES", "DirectPreference", "Supervised"]
