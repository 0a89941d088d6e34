"""Adapter methods, each a frozen description (method.py) in its own file. A new one is registered here."""

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
from veneer.model.shapes import Shapes

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
METHODS = (*PLAIN, FROM_BASE, FROM_ERROR, DORA, RSLORA, LORA)  # the first that applies is taken


def find_method(options: Any) -> AdapterMethod:
    """Find the method for a run's section `adapter`, or for PEFT's configuration of an adapter made by Veneer."""
    kind, setting = getattr(options, "peft_type", None), getattr(options, "method", None)
    return next(
        method
        for method in METHODS
        if (method.peft_type == kind if kind else method.setting == setting) and method.applies(options)
    )


def require_method(
    adapter: Adapter, shapes: Shapes, targets: frozenset[str], in_4_bits: frozenset[str] = frozenset()
) -> None:
    """Raise UserError where a run's method does not take its settings or its modules.

    Args:
        adapter: section `adapter` of a run.
        shapes: shapes of the model.
        targets: paths of the modules that the adapter is on.
        in_4_bits: paths of the modules in 4 bits.
    """
    method, setting = find_method(adapter), f"adapter.method = {adapter.method}"
    defaults = Adapter()
    asked = [name for name in Adapter.model_fields if getattr(adapter, name) != getattr(defaults, name)]
    if strange := [name for name in asked if not method.has(name)]:
        own = ", ".join(f"adapter.{name}" for name in method.takes or ())
        raise UserError(
            f"{setting}: {method.name} has no adapter.{strange[0]}",
            f"leave that out; it takes {own or 'the modules alone'}",
        )
    if adapter.init_lora_weights not in (True, "gaussian") and adapter.method != "lora":
        raise UserError(
            f"{setting}: adapter.init_lora_weights = {adapter.init_lora_weights} begins plain LoRA alone",
            "leave one of the two out",
        )
    if (on_embeddings := sorted(targets & shapes.embeddings.keys())) and not method.on_embeddings:
        raise UserError(
            f"{setting}: {method.name} takes linear layers, and {on_embeddings[0]} is an embedding",
            "leave it out of adapter.target_modules, or set adapter.method: lora",
        )
    if (transposed := sorted(targets & shapes.transposed)) and not method.on_conv1d:
        raise UserError(
            f"{setting}: PEFT does not compute {method.name} on {transposed[0]}, a Conv1D, whose weight is transposed",
            f"set adapter.method to {_those('on_conv1d')}",
        )
    if targets & in_4_bits and not method.on_4_bits:
        raise UserError(
            f"{setting}: PEFT has no {method.name} on weights in 4 bits",
            f"leave the section `quantization` out, or set adapter.method to {_those('on_4_bits')}",
        )


def _those(able: str) -> str:
    """Return the methods for which an attribute is true, the usual ones first."""
    return ", ".join(dict.fromkeys(method.setting for method in reversed(METHODS) if getattr(method, able)))
