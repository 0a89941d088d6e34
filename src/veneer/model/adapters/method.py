"""The description of an adapter method: PEFT's configuration, its parameters, its initial zeros.

PEFT owns the modules and the file, and merges every kind it has. Each method has a file with its differences.
`options` are the section `adapter` of a run or PEFT's configuration of an adapter, which use the same names.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from veneer.config import Adapter
from veneer.model.shapes import Shapes
from veneer.model.target_modules import rank_of

# Settings that every method has.
OF_MODULES = ("method", "target_modules", "exclude_modules", "layers_to_transform")


@dataclass(frozen=True)
class AdapterMethod:
    """An adapter method.

    Attributes:
        name: name to display.
        peft_type: type of its configuration in PEFT.
        setting: value of `adapter.method`.
        applies: whether options ask for it.
        configure: function that makes PEFT's configuration from a run's settings and the target modules for PEFT.
        stand_in: function that makes a stand-in for PEFT's layer in dry runs, with equal operations and parameters on
            the meta device, from a frozen layer (None: it is not called), its inputs and outputs, rank and dropout.
        zeros: names of the parameters that are zero at first, so that the others have no gradient yet; None: all have
            gradients at the first step.
        begins_as_base: whether its output is the base's, to the bit, before it is trained.
        scale: factor of the product of its matrices, for given options.
        usual_scale: range outside of which it trains badly; None: not known.
        rate_scale: usual learning rates, relative to LoRA's.
        is_low_rank: whether `low_rank` reads its linear layers, as the fused engine needs.
        frozen_share: share of its parameters that stay as they began.
        on_embeddings: whether it takes embeddings.
        on_4_bits: whether it takes bases in 4 bits.
        on_conv1d: whether it takes Transformers' Conv1D, whose weights are transposed (GPT-2).
        takes: settings of the section that it has beside those of modules; None: all.
    """

    name: str
    peft_type: str
    applies: Callable[[Any], bool]
    configure: Callable[[Adapter, str | list[str]], Any]
    stand_in: Callable[[Any, int, int, int, float], Any]
    setting: str = "lora"
    zeros: re.Pattern[str] | None = None
    begins_as_base: bool = True
    scale: Callable[[Any], float] = lambda options: 1.0
    usual_scale: tuple[float, float] | None = None
    rate_scale: float = 1.0
    is_low_rank: bool = False
    frozen_share: float = 0.0
    on_embeddings: bool = True
    on_4_bits: bool = True
    on_conv1d: bool = True
    takes: tuple[str, ...] | None = None

    @property
    def is_lora(self) -> bool:
        """Whether it trains LoRA's matrices A and B, of all settings of the section."""
        return self.peft_type == "LORA"

    def has(self, setting: str) -> bool:
        """Return whether a setting of the section `adapter` has an effect on it."""
        return self.takes is None or setting in self.takes or setting in OF_MODULES

    def learns_first(self, name: str) -> bool:
        """Return whether a parameter of it has a gradient at the first step."""
        return self.zeros is None or self.zeros.search(name) is not None

    def sizes(
        self, shapes: Shapes, targets: frozenset[str], r: int, rank_pattern: Iterable[tuple[str, int]] = ()
    ) -> list[int]:
        """Return the sizes of its parameters on modules of a model, in the order of their paths."""
        sides = ((path, *(shapes.linears.get(path) or shapes.embeddings[path])) for path in sorted(targets))
        ranked = ((inputs, outputs, rank_of(path, r, rank_pattern)) for path, inputs, outputs in sides)
        return [size for side in ranked for size in _sizes(self, *side)]


@lru_cache(maxsize=256)
def _sizes(method: AdapterMethod, inputs: int, outputs: int, r: int) -> tuple[int, ...]:
    return tuple(parameter.numel() for parameter in method.stand_in(None, inputs, outputs, r, 0.0).parameters())
