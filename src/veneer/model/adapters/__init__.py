"""Adapter methods, each a frozen description (method.py) in its own file. A new one is registered here."""

from collections.abc import Collection
from typing import Any

from veneer.config import Adapter, UserError
from veneer.model.adapters.dora import DORA
from veneer.model.adapters.fourierft import FOURIERFT
from veneer.model.adapters.from_base import FROM_BASE
from veneer.model.adapters.from_error import FROM_ERROR
from veneer.model.adapters.hra import HRA
from veneer.model.adapters.ia3 import IA3
from veneer.model.adapters.loha import LOHA
from veneer.model.adapters.lokr import LOKR
from veneer.model.adapters.lora import LORA, MOVES_THE_BASE, LowRank, low_rank
from veneer.model.adapters.method import AdapterMethod
from veneer.model.adapters.oft import OFT
from veneer.model.adapters.rslora import RSLORA
from veneer.model.adapters.vera import VERA

__all__ = [
    "LORA",
    "METHODS",
    "MOVES_THE_BASE",
    "AdapterMethod",
    "LowRank",
    "find_method",
    "low_rank",
    "require_method",
]

PLAIN = (VERA, IA3, LOHA, LOKR, OFT, HRA, FOURIERFT)  # by PEFT's modules alone
METHODS = (FROM_BASE, FROM_ERROR, DORA, RSLORA, LORA, *PLAIN)  # the first that applies is taken
OF_MODULES = {"method", "target_modules", "exclude_modules", "layers_to_transform"}  # settings that all methods take


def find_method(options: Any) -> AdapterMethod:
    """Find the method for a run's section `adapter`, or for PEFT's configuration of an adapter made by Veneer."""
    kind, setting = getattr(options, "peft_type", None), getattr(options, "method", None)
    return next(
        method
        for method in METHODS
        if (method.peft_type == kind if kind else method.setting == setting) and method.applies(options)
    )


def require_method(
    adapter: Adapter, targets: Collection[str], embeddings: Collection[str], in_4_bits: Collection[str] = ()
) -> None:
    """Raise UserError where a run's method does not take its settings or its modules.

    Args:
        adapter: section `adapter` of a run.
        targets: paths of the modules that the adapter is on.
        embeddings: paths of the model's embeddings.
        in_4_bits: paths of the modules in 4 bits.
    """
    method, setting = find_method(adapter), f"adapter.method = {adapter.method}"
    defaults = Adapter()
    asked = [name for name in Adapter.model_fields if getattr(adapter, name) != getattr(defaults, name)]
    for name in asked:
        if method.takes is not None and name not in OF_MODULES | set(method.takes):
            own = ", ".join(f"adapter.{own}" for own in method.takes)
            raise UserError(
                f"{setting}: {method.name} has no adapter.{name}",
                f"leave that out; it takes {own or 'the modules alone'}",
            )
    if adapter.init_lora_weights not in (True, "gaussian") and adapter.method != "lora":
        raise UserError(
            f"{setting}: adapter.init_lora_weights = {adapter.init_lora_weights} begins plain LoRA alone",
            "leave one of the two out",
        )
    on_embeddings = sorted(set(targets) & set(embeddings))
    if on_embeddings and not method.on_embeddings:
        raise UserError(
            f"{setting}: {method.name} takes linear layers, and {on_embeddings[0]} is an embedding",
            "leave it out of adapter.target_modules, or set adapter.method: lora",
        )
    if set(targets) & set(in_4_bits) and not method.on_4_bits:
        able = dict.fromkeys(known.setting for known in METHODS if known.on_4_bits)
        raise UserError(
            f"{setting}: PEFT has no {method.name} on weights in 4 bits",
            f"leave the section `quantization` out, or set adapter.method to {', '.join(able)}",
        )
