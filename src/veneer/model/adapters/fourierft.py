"""FourierFT (arXiv 2405.03003) adds a matrix that has 1,000 trained values as its spectrum; it begins as zeros."""

from typing import Any

from veneer.config import Adapter
from veneer.model.adapters.by_peft import stand_in_of
from veneer.model.adapters.method import AdapterMethod


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    from peft import FourierFTConfig

    return FourierFTConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        init_weights=True,
    )


FOURIERFT = AdapterMethod(
    name="FourierFT",
    setting="fourierft",
    peft_type="FOURIERFT",
    applies=lambda options: True,
    configure=_configure,
    stand_in=stand_in_of(_configure),
    rate_scale=10.0,
    takes=(),
    on_embeddings=False,
    on_conv1d=False,
    on_4_bits=False,
)
