"""Objectives that a run can minimize, one file each. `veneer.engine.objective.Objective` defines what one is."""

from collections.abc import Callable

from veneer.config import Cpo, Dpo, Kto, Orpo, Simpo, Train
from veneer.engine.objective import Objective
from veneer.training.objectives.cpo import ContrastivePreference
from veneer.training.objectives.dpo import DirectPreference
from veneer.training.objectives.kto import KahnemanTversky
from veneer.training.objectives.orpo import OddsRatioPreference
from veneer.training.objectives.simpo import SimplePreference
from veneer.training.objectives.supervised import Supervised

# By the names of `train.objective`; each has its settings in the section of that name.
OBJECTIVES: dict[str, Callable[[Train], Objective]] = {
    "sft": lambda train: Supervised(),
    "dpo": lambda train: DirectPreference.of(train.dpo or Dpo()),
    "kto": lambda train: KahnemanTversky.of(train.kto or Kto()),
    "orpo": lambda train: OddsRatioPreference.of(train.orpo or Orpo()),
    "simpo": lambda train: SimplePreference.of(train.simpo or Simpo()),
    "cpo": lambda train: ContrastivePreference.of(train.cpo or Cpo()),
}

__all__ = [
    "OBJECTIVES",
    "ContrastivePreference",
    "DirectPreference",
    "KahnemanTversky",
    "OddsRatioPreference",
    "SimplePreference",
    "Supervised",
]
