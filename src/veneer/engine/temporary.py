"""Contexts that change a model temporarily, for checks, and restore it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

from veneer.machine.device import rng_state, set_rng_state
from veneer.model.adapters import find_method
from veneer.model.full import is_full

REACH = 0.1  # size of the adapters' output in checks relative to their input's, whatever their rank and scale


@contextmanager
def preserve_adapter(model: Any) -> Iterator[None]:
    """On exit, restore the trained weights, in place, and the random number generators; gradients are dropped."""
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
    if is_full(model):
        return
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


def lies_on_host(model: Any) -> bool:
    """Return whether a GPU's model has frozen weights in the host's memory, which Transformers cannot compute with."""
    return len({parameter.device.type for parameter in model.parameters() if not parameter.requires_grad}) > 1


@contextmanager
def first_blocks(model: Any, count: int, vocabulary: int, device: str) -> Iterator[None]:
    """Within the context, a model has fewer decoder blocks, a smaller vocabulary, and all its weights on one device.

    On exit it has its own tensors again, also where an engine that was built within has replaced those of the adapter.

    Args:
        model: PEFT model whose blocks are `layers` of its base.
        count: number of blocks that are left, the first ones.
        vocabulary: number of tokens that are left, the first ones.
        device: device for what is left.
    """
    base = model.get_base_model()
    inner, embeddings = base.base_model, base.get_input_embeddings()
    layers, padding = inner.layers, embeddings.padding_idx
    inner.layers, embeddings.padding_idx = layers[:count], None
    ends = {id(embeddings.weight), id(base.get_output_embeddings().weight)}
    tensors = [(parameter, parameter.data) for parameter in model.parameters()]
    own = ((module, module._parameters.get("weight")) for module in model.modules())  # PEFT's layers name their base's
    states = [(module, state) for module, weight in own if (state := getattr(weight, "quant_state", None)) is not None]
    try:
        for parameter, data in tensors:
            parameter.data = (data[:vocabulary] if id(parameter) in ends else data).to(device)
        for module, state in states:
            module.weight.quant_state = module.quant_state = moved = deepcopy(state)
            moved.to(device)
        yield
    finally:
        inner.layers, embeddings.padding_idx = layers, padding
        for parameter, data in tensors:
            parameter.data = data
        for module, state in states:
            module.weight.quant_state = module.quant_state = state
