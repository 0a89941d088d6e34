"""The bytes that full fine-tuning holds beside weights and activations: masters, optimizer states, workspace.

So do 16-bit biases and modules that are trained beside an adapter. The optimizer (training/full_optimizer.py) updates
one weight at a time, and one that takes elements by themselves in slices, so its workspace is small whatever the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

from veneer.engine.trace import rounded
from veneer.model.shapes import Shapes
from veneer.model.start import LOW_RANK

BLOCK = 256  # values that share a constant in 8-bit states
LEAST_8BIT = 4096  # elements from which a weight has 8-bit states, as in bitsandbytes
SLICE = 2**24  # elements that are updated at a time


def low_rank_sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the smaller and the larger side of a weight."""
    return min(shape), max(shape)


def has_low_rank(name: str, shape: tuple[int, ...], linear: Iterable[str], optim: str, rank: int) -> bool:
    """Return whether a weight's moments are kept in fewer dimensions: it is of a linear layer that is wide enough.

    Args:
        name, shape: those of the weight.
        linear: names of the weights of linear layers.
        optim: name of the optimizer, as `train.optim` resolves.
        rank: the setting `train.optim_rank`.
    """
    return optim in LOW_RANK and name in linear and len(shape) == 2 and rank < min(shape)


@dataclass(frozen=True)
class FullStates:
    """What decides the memory of the updates of full fine-tuning, beside optimizer and weights.

    Attributes:
        rank: the setting `train.optim_rank`.
        has_masters: whether 16-bit weights have a float32 copy.
    """

    rank: int = 256
    has_masters: bool = True

    def bytes(self, shapes: Shapes, optim: str, itemsize: int) -> dict[str, int]:
        """Return the bytes of the optimizer's states and of the float32 copy.

        Args:
            shapes: shapes of the base.
            optim: name of the optimizer, as `train.optim` resolves.
            itemsize: bytes of a number of the weights.
        """
        linear = _linear_weights(shapes)
        states = 0
        for name, shape in shapes.weights.items():
            count = prod(shape)
            if has_low_rank(name, shape, linear, optim, self.rank):
                smaller, larger = low_rank_sides(shape)
                states += 2 * rounded(4 * self.rank * larger)
                states += rounded(4 * self.rank * smaller) if optim == "galore_adamw" else rounded(4)
            else:
                states += moment_bytes(count, optim)
        found = {"optimizer": states}
        if self.has_masters and itemsize < 4:
            found["float32 weights"] = master_bytes([prod(shape) for shape in shapes.weights.values()])
        return found

    def workspace_bytes(self, shapes: Shapes, optim: str, itemsize: int) -> int:
        """Return the most bytes that the update of one weight takes beside what is held; arguments as of `bytes`."""
        linear = _linear_weights(shapes)
        copies = 0 if itemsize == 4 else 1 if self.has_masters else 3  # gradient; weight and random bits

        def of(name: str, shape: tuple[int, ...]) -> int:
            if not has_low_rank(name, shape, linear, optim, self.rank):
                return 4 * copies * min(prod(shape), SLICE)
            smaller, larger = low_rank_sides(shape)
            square = 2 * smaller * smaller if optim == "galore_adamw" else 0
            return 4 * ((max(copies, 1) + 1) * smaller * larger + self.rank * (4 * larger + smaller) + square)

        return max(of(name, shape) for name, shape in shapes.weights.items())


USUAL = FullStates()


def moment_bytes(count: int, optim: str) -> int:
    """Return the bytes of both moments of `count` numbers, a moment a number."""
    if "8bit" in optim and count >= LEAST_8BIT:
        return 2 * (rounded(count) + rounded(4 * ceil(count / BLOCK)))
    return 2 * rounded(4 * count)


def master_bytes(sizes: Iterable[int]) -> int:
    """Return the bytes of float32 copies of parameters of these sizes."""
    return sum(rounded(4 * count) for count in sizes)


def _linear_weights(shapes: Shapes) -> frozenset[str]:
    return frozenset(f"{path}.weight" for path in shapes.quantizable())
