"""What an adapter method is, for whoever must know it: PEFT's configuration, its parameters, how it begins.

PEFT owns the modules and the file, and merges every kind it has. What differs between methods stands in a file each.
`options` are the section `adapter` of a run or PEFT's configuration of an adapter: they name things alike.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from veneer.config import Adapter
from veneer.model.shapes import Shapes


@dataclass(frozen=True)
class AdapterMethod:
    """A method.

    Attributes:
        name: For a person.
        peft_type: The type of its configuration in PEFT.
        applies: Whether options ask for it.
        configure: Makes PEFT's configuration from a run's settings and what PEFT is to match.
        stand_in: Makes what stands for PEFT's layer in dry runs: the same operations and parameters on the meta device,
            around a frozen layer (None: it is not called), with its inputs and outputs, a rank and a dropout.
        zeros: Names of the parameters that are zero at first; until they move, the others have no gradient. None: no
            parameter waits for another.
        scale: What a product of its matrices is multiplied by, for given options.
        usual_scale: The range outside of which it trains badly; None: not known.
        is_low_rank: Whether `low_rank` reads its linear layers, as the fused engine needs.
    """

    name: str
    peft_type: str
    applies: Callable[[Any], bool]
    configure: Callable[[Adapter, str | list[str]], Any]
    stand_in: Callable[[Any, int, int, int, float], Any]
    zeros: re.Pattern[str] | None = None
    scale: Callable[[Any], float] = lambda options: 1.0
    usual_scale: tuple[float, float] | None = None
    is_low_rank: bool = False

    def learns_first(self, name: str) -> bool:
        """Whether a parameter of it has a gradient at the first step."""
        return self.zeros is None or self.zeros.search(name) is not None

    def sizes(self, shapes: Shapes, targets: frozenset[str], r: int) -> list[int]:
        """Sizes of its parameters on modules of a model, in the order of their paths."""
        sides = (shapes.linears.get(path) or shapes.embeddings[path] for path in sorted(targets))
        return [size for inputs, outputs in sides for size in _sizes(self, inputs, outputs, r)]


@lru_cache(maxsize=256)
def _sizes(method: AdapterMethod, inputs: int, outputs: int, r: int) -> tuple[int, ...]:
    return tuple(parameter.numel() for parameter in method.stand_in(None, inputs, outputs, r, 0.0).parameters())
