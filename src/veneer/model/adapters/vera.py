"""VeRA (arXiv 2310.11454) trains two vectors a module, between random matrices that all modules share.

The matrices are saved with the vectors, so that the adapter does not depend on a generator of random numbers.
"""

import re
from typing import Any

from veneer.config import Adapter
from veneer.model.adapters.by_peft import stand_in_of
from veneer.model.adapters.method import AdapterMethod


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        r=adapter.r,
        vera_dropout=adapter.lora_dropout,
    )


VERA = AdapterMethod(
    name="VeRA",
    setting="vera",
    peft_type="VERA",
    applies=lambda options: True,
    configure=_configure,
    stand_in=stand_in_of(_configure),
    zeros=re.compile(r"\.vera_lambda_b\."),
    rate_scale=10.0,
    takes=("r", "lora_dropout"),
    on_embeddings=False,
)
