"""Contexts that change a model temporarily, for checks, and restore it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from veneer.machine.device import rng_state, set_rng_state
from veneer.model.adapters import find_method

REACH = 0.1  # size of the adapters' output in checks relative to their input's, whatever their rank and scale


@contextmanager
def preserve_adapter(model: Any) -> Iterator[None]:
    """On exit, restore the adapter, in place, and the random number generators; gradients are dropped."""
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = [parameter.detach().clone() for parameter in adapter]
    rng = rng_state()
    try:
        yield
    finally:
        for parameter, before in zip(adapter, saved, strict=True):
            parameter.data.copy_(before)
            parameter.grad = None
        set_rng_state(rng)


def fill_zeros(model: Any) -> None:
    """Fill the adapter's matrices that are zero at first with small random values, so that others get gradients."""
    config = model.peft_config["default"]
    method = find_method(config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if method.zeros is not None and method.zeros.search(name):
            torch.nn.init.normal_(parameter.data, std=REACH / (method.scale(config) * math.sqrt(config.r)))


@contextmanager
def no_dropout(model: Any) -> Iterator[None]:
    """Within the context, a model's dropout modules drop nothing, in training mode too."""
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    before = [module.p for module in modules]
    try:
        for module in modules:
            module.p = 0.0
        yield
    finally:
        for module, p in zip(modules, before, strict=True):
            module.p = p
