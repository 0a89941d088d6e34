"""LoKr (arXiv 2309.14859) adds the Kronecker product of two small matrices, one of them of low rank."""

import re
from typing import Any

from veneer.config import Adapter
from veneer.model.adapters.by_peft import stand_in_of
from veneer.model.adapters.method import AdapterMethod


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        r=adapter.r,
        alpha=adapter.lora_alpha,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
    )


LOKR = AdapterMethod(
    name="LoKr",
    setting="lokr",
    peft_type="LOKR",
    applies=lambda options: True,
    configure=_configure,
    stand_in=stand_in_of(_configure),
    zeros=re.compile(r"\.lokr_w1\."),
    takes=("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    on_embeddings=False,
    on_conv1d=False,
    on_4_bits=False,
)
