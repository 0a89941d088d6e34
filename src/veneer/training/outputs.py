"""Adds up what an objective returns for several batches, and makes means of it."""

import math
from collections.abc import Sequence

import torch

from veneer.engine.objective import StepOutput


def add_up(outputs: Sequence[StepOutput]) -> dict[str, torch.Tensor]:
    """Add up weight, loss and metrics of several batches."""
    found = [{"weight": output.weight, "loss": output.loss, **output.metrics} for output in outputs]
    return {name: torch.stack([sums[name] for sums in found]).sum() for name in found[0]}


def means_of(sums: dict[str, float]) -> dict[str, float]:
    """Divide by the weight; metrics that are NaN are left out."""
    weight = sums.pop("weight")
    return {name: value / weight for name, value in sums.items() if name == "loss" or not math.isnan(value)}
