"""HRA (arXiv 2405.17484) reflects a module's inputs in r hyperplanes."""

from typing import Any

from veneer.config import Adapter
from veneer.model.adapters.by_peft import stand_in_of
from veneer.model.adapters.method import AdapterMethod


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    from peft import HRAConfig

    return HRAConfig(
        task_type="CAUSAL_LM",
        target_modules=targets,
        r=adapter.r,
    )


HRA = AdapterMethod(
    name="HRA",
    setting="hra",
    peft_type="HRA",
    applies=lambda options: True,
    configure=_configure,
    stand_in=stand_in_of(_configure),
    takes=("r",),
    on_embeddings=False,
    on_conv1d=False,
    on_4_bits=False,
    begins_as_base=False,
)
