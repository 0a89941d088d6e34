"""Checks once that every matrix that must learn has a gradient: otherwise training does nothing there, in silence."""

import math
from collections.abc import Callable
from typing import Any

import torch

from veneer.config import JobError
from veneer.model.adapters import find_method
from veneer.model.full import is_full


class FirstGradients:
    """Checks the gradients of the first step in which they are finite.

    Args:
        model: The PEFT model, or the model that is trained whole.
    """

    def __init__(self, model: Any) -> None:
        self._is_full = is_full(model)
        self._parameters = learn_first(model)
        self._is_done = False

    def sizes(self, largest: Callable[[torch.nn.Parameter], torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Return the largest magnitude in the gradient of each matrix that learns first, until they were checked.

        Args:
            largest: function that knows it of a parameter; None: by the gradients that the parameters hold.
        """
        return [] if self._is_done else [*map(largest or _largest, self._parameters.values())]

    def require(self, sizes: list[float]) -> None:
        """Check what `sizes` returned.

        Raises:
            JobError: A matrix has no gradient, or none that can be used.
        """
        if self._is_done:
            return
        self._is_done = True
        bad = [name for name, value in zip(self._parameters, sizes, strict=True) if not 0 < value < math.inf]
        if bad:
            raise JobError(
                f"{len(bad)} {'' if self._is_full else 'adapter '}matrices got no usable gradient in the first "
                f"step, first {bad[0]}: training would do nothing there\n  fix: "
                + ("train an adapter" if self._is_full else "set adapter.target_modules to modules the model uses")
            )


def learn_first(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the matrices that have a gradient at the first step, by name. Of a bias it may be zero (of keys)."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if is_full(model):
        return {name: parameter for name, parameter in trained.items() if parameter.dim() > 1}
    method = find_method(model.peft_config["default"])
    return {name: parameter for name, parameter in trained.items() if method.learns_first(name)}


def _largest(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros(()) if parameter.grad is None else parameter.grad.abs().amax()
