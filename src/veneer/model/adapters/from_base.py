"""PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) train a part B A of the base's own weights.

PEFT takes that part out of the base, W - s B0 A0, so that its adapter belongs to weights that no file holds. Here the
base stays as it is, and the adapter has twice the rank: B A, which is trained, and -B0 A0, which stays as it began.
Both compute the same, and this one is plain LoRA on the original base at every moment: off, saved, resumed and merged.

B A is large and changes little, which is lost where it is rounded to 16 bits; so the fused engine leaves it alone.
Others who load the adapter may round it, so it is delivered as its change, in factors of the same rank: B A - B0 A0 =
(B - B0) A + B0 (A - A0). A checkpoint keeps it as it is trained.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from veneer.config import Adapter, UserError
from veneer.model.adapters.lora import LORA, lora_config
from veneer.model.adapters.rslora import RSLORA

KINDS = ("pissa", "olora")  # values of init_lora_weights


def starts_from_base(options: Any) -> bool:
    """Return whether an adapter is of this method."""
    return getattr(options, "init_lora_weights", True) in KINDS


def doubled(adapter: Adapter) -> Adapter:
    """Return the settings of the plain LoRA that an adapter is: of this method, it has twice the rank."""
    if not starts_from_base(adapter):
        return adapter
    factor = math.sqrt(2) if adapter.use_rslora else 2.0
    return adapter.model_copy(
        update={
            "r": 2 * adapter.r,
            "lora_alpha": factor * adapter.lora_alpha,
            "rank_pattern": {pattern: 2 * rank for pattern, rank in adapter.rank_pattern.items()},
            "alpha_pattern": {pattern: factor * alpha for pattern, alpha in adapter.alpha_pattern.items()},
        }
    )


def refuse_4_bits(kind: object) -> UserError:
    """Return the message for a base in 4 bits."""
    return UserError(
        f"adapter.init_lora_weights = {kind}: the base is in 4 bits, and a part of its rounded weights is not what the "
        "method trains",
        "leave the section `quantization` out, or set adapter.init_lora_weights: true",
    )


@torch.no_grad()
def take_part_of_base(model: Any, kind: str) -> None:
    """Fill a new adapter of `doubled` rank from the base's weights, in place; its output is zero.

    Raises:
        UserError: a module is no linear layer, is in 4 bits, or is smaller than the rank.
    """
    setting = f"adapter.init_lora_weights = {kind}"
    for path, layer in model.get_base_model().named_modules():
        if "default" in getattr(layer, "lora_embedding_A", ()):
            raise UserError(f"{setting}: {path} is no linear layer", "leave it out of adapter.target_modules")
        if "default" not in getattr(layer, "lora_A", ()):
            continue
        weight = layer.get_base_layer().weight
        if getattr(weight, "quant_state", None) is not None:
            raise refuse_4_bits(kind)
        w_OI = weight.float().T if layer.fan_in_fan_out else weight.float()
        a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rank = len(a_RI) // 2
        if rank > min(w_OI.shape):
            raise UserError(f"{setting}: rank {rank} is more than {path} has ({min(w_OI.shape)})", "lower adapter.r")
        if kind == "pissa":
            u_OK, s_K, v_KI = torch.linalg.svd(w_OI, full_matrices=False)
            root_R = (s_K[:rank] / layer.scaling["default"]).sqrt()
            b0_OR, a0_RI = u_OK[:, :rank] * root_R, root_R[:, None] * v_KI[:rank]
        else:
            q_OK, r_KI = torch.linalg.qr(w_OI)
            b0_OR, a0_RI = q_OK[:, :rank], r_KI[:rank]
        a_RI.copy_(torch.cat([a0_RI, a0_RI]))
        b_OR.copy_(torch.cat([b0_OR, -b0_OR], dim=1))


def drop_frozen_gradients(model: Any) -> None:
    """Zero the gradients of -B0 A0, in place, so that it stays as it began."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and ".lora_A." in name:
            parameter.grad[parameter.shape[0] // 2 :].zero_()
        elif parameter.grad is not None and ".lora_B." in name:
            parameter.grad[:, parameter.shape[1] // 2 :].zero_()


def as_changes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the matrices of an adapter's file as its change: [A; A - A0] and [B - B0, B0], of [A; A0] and [B, -B0]."""
    found = dict(weights)
    for name, matrix in weights.items():
        if ".lora_A." in name:
            moved, began = matrix.chunk(2)
            found[name] = torch.cat([moved, moved - began])
        elif ".lora_B." in name:
            moved, began = matrix.chunk(2, dim=1)
            found[name] = torch.cat([moved + began, -began], dim=1)
    return found


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    config = lora_config(doubled(adapter), targets)
    config.use_rslora = adapter.use_rslora
    return config


FROM_BASE = replace(
    LORA,
    name="PiSSA or OLoRA",
    applies=starts_from_base,
    configure=_configure,
    zeros=None,
    scale=lambda options: (RSLORA if options.use_rslora else LORA).scale(options),
    usual_scale=None,
    is_low_rank=False,  # for the fused engine; see above
    frozen_share=0.5,
    begins_as_base=False,
)
