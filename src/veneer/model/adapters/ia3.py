"""(IA)^3 (arXiv 2205.05638) trains a factor for each output of a module."""

from typing import Any

from veneer.config import Adapter
from veneer.model.adapters.by_peft import stand_in_of
from veneer.model.adapters.method import AdapterMethod


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    from peft import IA3Config

    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=[],
    )


IA3 = AdapterMethod(
    name="(IA)^3",
    setting="ia3",
    peft_type="IA3",
    applies=lambda options: True,
    configure=_configure,
    stand_in=stand_in_of(_configure),
    rate_scale=10.0,
    takes=(),
    on_embeddings=False,
)
