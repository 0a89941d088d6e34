"""OFT (arXiv 2306.07280) turns a module's inputs by orthogonal matrices, in blocks of 32 inputs."""

from typing import Any

from veneer.config import Adapter
from veneer.model.adapters.by_peft import stand_in_of
from veneer.model.adapters.method import AdapterMethod


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    from peft import OFTConfig

    return OFTConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        oft_block_size=32,
    )


OFT = AdapterMethod(
    name="OFT",
    setting="oft",
    peft_type="OFT",
    applies=lambda options: True,
    configure=_configure,
    stand_in=stand_in_of(_configure),
    takes=(),
    on_embeddings=False,
    on_conv1d=False,
)
