"""Adapter methods, each a frozen description (method.py) in its own file. A new one is registered here."""

from typing import Any

from veneer.model.adapters.from_base import FROM_BASE
from veneer.model.adapters.from_error import FROM_ERROR
from veneer.model.adapters.lora import LORA, MOVES_THE_BASE, LowRank, low_rank
from veneer.model.adapters.method import AdapterMethod
from veneer.model.adapters.rslora import RSLORA

__all__ = ["LORA", "METHODS", "MOVES_THE_BASE", "AdapterMethod", "LowRank", "find_method", "low_rank"]

METHODS = (FROM_BASE, FROM_ERROR, RSLORA, LORA)  # the first that applies is taken


def find_method(options: Any) -> AdapterMethod:
    """Find the method for a run's section `adapter`, or for PEFT's configuration of an adapter made by Veneer."""
    kind = getattr(options, "peft_type", None)
    return next(method for method in METHODS if kind in (None, method.peft_type) and method.applies(options))
