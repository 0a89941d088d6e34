"""DoRA (arXiv 2402.09353) computes y = m / |W + s B A| * (W x + s B A x), row by row of the weight.

m is trained and begins as the norms of W, so that the output is the base's at first; the norm in the denominator gets
no gradient (section 4.3 of the paper). A bias is added after that. The scale s is LoRA's, or rsLoRA's.

With dropout PEFT drops from the input of the product with (m / norm - 1) W too, and computes that product a second
time; the fused engine drops from the adapter's input alone.
"""

from dataclasses import replace
from typing import Any

import torch

from veneer.config import Adapter
from veneer.model.adapters.lora import LORA, LinearStandIn, lora_config
from veneer.model.adapters.rslora import RSLORA


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    config = lora_config(adapter, targets)
    config.use_dora, config.use_rslora = True, adapter.use_rslora
    return config


class _DoraLinear(LinearStandIn):
    """A stand-in for PEFT's layer; see `AdapterMethod.stand_in`."""

    def __init__(self, base_layer: Any, inputs: int, outputs: int, r: int, dropout: float) -> None:
        super().__init__(base_layer, inputs, outputs, r, dropout)
        self.lora_variant = {"default": "dora"}
        self.lora_magnitude_vector = torch.nn.ModuleDict({"default": torch.nn.Module()})
        self.lora_magnitude_vector["default"].weight = torch.nn.Parameter(torch.empty(outputs, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x)
        dtype = result.dtype
        if hasattr(self.base_layer, "is_4bit"):
            result = result.clone()
        x = x.to(torch.float32)
        base_result: torch.Tensor | None = result
        if self.lora_dropout["default"].p and self.training:
            x, base_result = self._dropout(x), None
        return (result + self._scaled(x, base_result, dtype)).to(dtype)

    def _scaled(self, x: torch.Tensor, base_result: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        lora_A: Any = self.lora_A["default"]
        lora_B: Any = self.lora_B["default"]
        magnitude = self.lora_magnitude_vector["default"].weight
        lora_weight = lora_B(lora_A(torch.eye(lora_A.weight.shape[1], device=x.device))).T.to(x.dtype)
        weight = getattr(self.base_layer, "weight", None)
        if weight is None or weight.shape != lora_weight.shape:  # in 4 bits: it is dequantized; or it is transposed
            weight = torch.empty(lora_weight.shape, dtype=dtype, device=x.device)
        weight = weight.to(x.dtype)
        weight_norm = torch.linalg.norm(weight + 2.0 * lora_weight.detach(), dim=1).detach()
        scale = (magnitude / weight_norm).view(1, -1)
        lora_result = lora_B(lora_A(x))
        if base_result is None:
            base_result = torch.nn.functional.linear(x, weight)
        elif getattr(self.base_layer, "bias", None) is not None:
            base_result = base_result - self.base_layer.bias
        result: torch.Tensor = (scale - 1) * base_result + scale * lora_result * 2.0
        return result


DORA = replace(
    LORA,
    name="DoRA",
    setting="dora",
    applies=lambda options: bool(getattr(options, "use_dora", True)),  # the section has no such flag
    configure=_configure,
    stand_in=_DoraLinear,
    scale=lambda options: (RSLORA if options.use_rslora else LORA).scale(options),
    usual_scale=None,
    on_embeddings=False,
)
