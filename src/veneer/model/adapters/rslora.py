"""Rank-stabilized LoRA (arXiv 2312.03732) is LoRA with s = lora_alpha / sqrt(r)."""

import math
from dataclasses import replace
from typing import Any

from veneer.config import Adapter
from veneer.model.adapters.lora import LORA, lora_config


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    config = lora_config(adapter, targets)
    config.use_rslora = True
    return config


RSLORA = replace(
    LORA,
    name="rsLoRA",
    applies=lambda options: bool(getattr(options, "use_rslora", False)),
    configure=_configure,
    scale=lambda options: float(options.lora_alpha / math.sqrt(options.r)),
    usual_scale=None,
)
