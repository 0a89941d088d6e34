"""Describes methods whose layers PEFT alone knows: a dry run takes PEFT's own layer as the stand-in.

Its operations and parameters are then PEFT's by themselves. It takes PEFT's import, which plans of LoRA do without.
"""

from collections.abc import Callable
from typing import Any

import torch

from veneer.config import Adapter
from veneer.model.quiet import quiet

StandIn = Callable[[Any, int, int, int, float], Any]


class _Holder(torch.nn.Module):
    """A model of one linear layer, which PEFT puts its own layer around."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear: Any = torch.nn.Linear(inputs, outputs, bias=False, device="meta")


def stand_in_of(configure: Callable[[Adapter, str | list[str]], Any]) -> StandIn:
    """Return `AdapterMethod.stand_in` for a method that PEFT puts on linear layers.

    Args:
        configure: `AdapterMethod.configure` of it.
    """

    def stand_in(base_layer: Any, inputs: int, outputs: int, r: int, dropout: float) -> Any:
        with quiet():
            from peft import get_peft_model

            holder: Any = _Holder(inputs, outputs)
            config = configure(Adapter(r=r, lora_dropout=dropout), ["linear"])
            config.task_type = None  # it is no language model
            layer = get_peft_model(holder, config, low_cpu_mem_usage=True).get_base_model().linear
        layer.base_layer = torch.nn.Identity() if base_layer is None else base_layer
        return layer

    return stand_in
