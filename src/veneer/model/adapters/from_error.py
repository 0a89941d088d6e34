"""LoftQ (arXiv 2310.08659) begins an adapter with the error of its base's 4 bits: W - NF4(W), as well as its rank can.

The base stays as bitsandbytes rounded it, so that any QLoRA base takes the adapter; further rounds of LoftQ would round
another matrix. PEFT's own function leaves out the adapter's scale, and works on CUDA alone.

Such an adapter belongs to the base in 4 bits. On the base in 16 bits, which has no such error, it would add one.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from veneer.config import UserError
from veneer.model.adapters.lora import LORA, lora_config
from veneer.model.adapters.rslora import RSLORA

KIND = "loftq"  # value of init_lora_weights
SETTING = f"adapter.init_lora_weights = {KIND}"
OVERSAMPLING, ITERATIONS = 16, 4  # of the randomized decomposition (torch.svd_lowrank)


def starts_from_error(options: Any) -> bool:
    """Return whether an adapter is of this method."""
    return getattr(options, "init_lora_weights", True) == KIND


def refuse_without_4_bits() -> UserError:
    """Return the message for a base that is not quantized here."""
    return UserError(
        f"{SETTING}: it corrects the rounding of weights that are quantized to 4 bits, and this base is not, or its "
        "files are in 4 bits already, without the weights that these were made from",
        "set `quantization: {bits: 4}` on a base in 16 or 32 bits, or adapter.init_lora_weights: true",
    )


@torch.no_grad()
def start_from_error(model: Any, weight_of: Callable[[str], torch.Tensor]) -> None:
    """Fill a new adapter, in place; it then makes up for a part of the base's rounding.

    Args:
        model: PEFT model on a base in 4 bits.
        weight_of: function from a module's path to its weight before it was quantized.

    Raises:
        UserError: no module is in 4 bits.
    """
    from bitsandbytes.functional import dequantize_4bit

    found = False
    for path, layer in model.get_base_model().named_modules():
        if "default" not in getattr(layer, "lora_A", ()):
            continue
        packed = layer.get_base_layer().weight
        if getattr(packed, "quant_state", None) is None:
            continue
        found = True
        error_OI = weight_of(path).to(packed.device).float() - dequantize_4bit(packed.data, packed.quant_state).float()
        a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rank = len(a_RI)
        u_OK, s_K, v_IK = torch.svd_lowrank(error_OI, min(rank + OVERSAMPLING, *error_OI.shape), ITERATIONS)
        root_R = (s_K[:rank] / layer.scaling["default"]).sqrt()
        kept = len(root_R)  # a matrix may have fewer singular values than ranks
        a_RI.zero_()[:kept] = root_R[:, None] * v_IK.T[:rank]
        b_OR.zero_()[:, :kept] = u_OK[:, :rank] * root_R
    if not found:
        raise refuse_without_4_bits()


def _configure(adapter: Any, targets: str | list[str]) -> Any:
    config = lora_config(adapter, targets)
    config.use_rslora = adapter.use_rslora
    return config


FROM_ERROR = replace(
    LORA,
    name="LoftQ",
    applies=starts_from_error,
    configure=_configure,
    zeros=None,
    scale=lambda options: (RSLORA if options.use_rslora else LORA).scale(options),
    usual_scale=None,
    begins_as_base=False,
)
