"""A model changed for a while: to look at its base alone, or to check something, after which it is what it was."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from veneer.engine.fused import FusedEngine
from veneer.engine.interface import Engine

REACH = 0.1  # of the input's size: what adapters add in checks, whatever their rank and scale


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Adapter and random numbers are afterwards what they were, in place; gradients are dropped."""
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in adapter]
    on_cpu = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        for parameter, before in zip(adapter, kept, strict=True):
            parameter.data.copy_(before)
            parameter.grad = None
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)


def fill_b(model: Any) -> None:
    """Give every LoRA B small random values, in place: while B is zero, as it begins, A has no gradient.

    Of an adapter on embeddings it is A that begins with zeros.
    """
    from peft.tuners.lora import LoraLayer  # takes a second to import, which a plan need not wait for

    torch.manual_seed(0)
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        matrices = [linear.weight for linear in module.lora_B.values()] + list(module.lora_embedding_A.values())
        for matrix in matrices:
            std = REACH / (module.scaling["default"] * math.sqrt(module.r["default"]))
            torch.nn.init.normal_(matrix.data, std=std)


@contextmanager
def adapter_off(model: Any, engine: Engine) -> Iterator[None]:
    """The base alone, for generation and for the engine's losses.

    PEFT's switch is in modules that the fused engine does not call, so its matrices are zero meanwhile.
    """
    with model.disable_adapter():
        if engine.master is None:
            yield
            return
        kept = engine.master.detach().clone()
        engine.master.data.zero_()
        try:
            yield
        finally:
            engine.master.data.copy_(kept)


@contextmanager
def dropout_off(model: Any, engine: Engine) -> Iterator[None]:
    """No dropout in training passes: two engines never draw the same mask."""
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    groups = [group for block in engine.blocks for group in block.groups] if isinstance(engine, FusedEngine) else []
    before = [module.p for module in modules], [group.dropout_p for group in groups]
    try:
        for module in modules:
            module.p = 0.0
        for group in groups:
            group.dropout_p = 0.0
        yield
    finally:
        for module, p in zip(modules, before[0], strict=True):
            module.p = p
        for group, p in zip(groups, before[1], strict=True):
            group.dropout_p = p
