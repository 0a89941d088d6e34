"""DoRA (arXiv 2402.09353) computes y = m / |W + s B A| * (W x + s B A x), row by row of the weight.

m is trained and begins as the norms of W, so that the output is the base's at first; the norm in the denominator gets
no gradient (section 4.3 of the paper). A bias is added after that. The scale s is LoRA's, or rsLoRA's.

With dropout PEFT drops from the input of the product with (m / norm - 1) W too, and computes that product a second
time; the fused engine drops from the adapter's input alone.

PEFT computes B A and the norms anew in each forward, which is most of the work of a step of generation; `norms_kept`
computes them once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from veneer.config import Adapter
from veneer.model.adapters.lora import LORA, LinearStandIn, LowRank, lora_config, low_rank
from veneer.model.adapters.rslora import RSLORA


@contextmanager
def norms_kept(model: Any) -> Iterator[None]:
    """Within the context, DoRA's layers scale by norms that are computed once, in place of PEFT's own forward.

    It does nothing to other layers, nor where the adapter is disabled. The model may only be used for inference
    meanwhile, without switching adapters or changing weights.
    """
    found = [(layer, low_rank(layer, or_dora=True)) for layer in model.modules() if hasattr(layer, "lora_variant")]
    layers = [
        (layer, factors)
        for layer, factors in found
        if factors is not None and factors.magnitude_O is not None and not layer.disable_adapters
    ]
    hooks = []
    try:
        for layer, factors in layers:
            hooks.append(layer.register_forward_hook(partial(_scale_output, factors, _factors_of(layer, factors))))
            layer.merged_adapters = [layer.active_adapters[0]]  # PEFT's forward is then the base layer's
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, _ in layers:
            layer.merged_adapters = []


@torch.no_grad()
def _factors_of(layer: Any, factors: LowRank) -> torch.Tensor:
    """Return m / |W + s B A| of a layer, float32."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer()).float()
    whole_OI = weight.T if layer.fan_in_fan_out else weight
    whole_OI = whole_OI + factors.scale * (factors.b_OR.float() @ factors.a_RI.float())
    found: torch.Tensor = factors.magnitude_O / torch.linalg.vector_norm(whole_OI, dim=1)
    return found


def _scale_output(factors: LowRank, factor_O: torch.Tensor, layer: Any, inputs: Any, result: torch.Tensor) -> Any:
    """Return the output of an adapted layer from that of its base layer; a forward hook."""
    bias = getattr(layer.get_base_layer(), "bias", None)
    added = factors.scale * ((inputs[0].to(factors.a_RI.dtype) @ factors.a_RI.T) @ factors.b_OR.T)
    if bias is None:
        return (factor_O * (result + added)).to(result.dtype)
    return (factor_O * (result - bias + added) + bias).to(result.dtype)


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
    begins_as_base=False,
)
