"""LoHa (arXiv 2108.06098) adds the elementwise product of two low-rank matrices, (B1 A1) * (B2 A2)."""

import re
from typing import Any

from veneer.config import Adapter
from veneer.model.adapters.by_peft import stand_in_of
from veneer.model.adapters.method import AdapterMethod


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        r=adapter.r,
        alpha=adapter.lora_alpha,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
    )


LOHA = AdapterMethod(
    name="LoHa",
    setting="loha",
    peft_type="LOHA",
    applies=lambda options: True,
    configure=_configure,
    stand_in=stand_in_of(_configure),
    zeros=re.compile(r"\.hada_w2_b\."),
    takes=("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    on_embeddings=False,
    on_conv1d=False,
    on_4_bits=False,
)
