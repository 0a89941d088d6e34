"""Whether an engine gives the reference engine's numbers on this model, this machine and these rows.

Losses are compared, the gradient of all adapters together and that of every matrix, with B filled so that A has a
gradient too. In float32 both engines are nearly exact and so is the comparison. In bfloat16 each is off the exact
gradient by some 4% on the whole and up to 20% in a single matrix of queries or keys (SmolLM2-135M), and two healthy
ones differ by as much; a wrong kernel is off by half or more in its own matrices, or by a third in all below it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from veneer.data.batch import Batch, Example
from veneer.engine.interface import Engine
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.engine.temporary import fill_zeros, untouched
from veneer.kernels.launch import KERNEL_ERRORS

FLOOR = 1e-3  # of the largest gradient: what is smaller moves nothing, and is compared with this much

ENOUGH = 32  # trained tokens of a row: the rounding errors of fewer do not cancel


class GradientLimits(NamedTuple):
    """Largest relative differences of a healthy engine: of the loss, of all gradients as one, of a single matrix's."""

    loss: float
    gradient: float
    matrix: float


def limits_of(dtype: torch.dtype, device: str) -> GradientLimits:
    """Limits of a compute precision; on a GPU products of float32 may round their inputs to 19 bits."""
    if dtype != torch.float32:
        return GradientLimits(0.02, 0.2, 0.4)
    return GradientLimits(1e-3, 1e-3, 1e-3) if device == "cpu" else GradientLimits(1e-3, 1e-2, 1e-2)


@dataclass(frozen=True)
class Agreement:
    """An engine beside the reference.

    Attributes:
        loss: Relative difference of a batch's loss.
        gradient: Of all adapters' gradients as one vector, by norm.
        matrix: The largest of an adapter matrix's gradient, by norm; infinite where one is not finite.
        worst: The matrix with that difference.
        limits: Of the three.
        failure: Why the engine gave no numbers at all; None: it gave some.
    """

    loss: float
    gradient: float
    matrix: float
    worst: str
    limits: GradientLimits
    failure: str | None = None

    @property
    def holds(self) -> bool:
        found = (self.loss, self.gradient, self.matrix)
        return all(value <= limit for value, limit in zip(found, self.limits, strict=True))

    def describe(self) -> str:
        """For a person: what differs, and where most."""
        if self.failure is not None:
            return self.failure
        loss, gradient, matrix = self.limits
        return (
            f"losses differ by {self.loss:.2g} (limit {loss:g}), gradients by {self.gradient:.2g} ({gradient:g}), "
            f"most in {self.worst} by {self.matrix:.2g} ({matrix:g})"
        )


def agree(model: Any, engine: Engine, batches: Sequence[Batch]) -> Agreement:
    """Compare an engine of a model with the reference engine of the same model.

    Adapter, random numbers and gradients' absence are afterwards as before. Dropout is off. A kernel that this machine
    cannot run is a disagreement, too.

    Raises:
        torch.OutOfMemoryError: There is no room for it.
    """
    weight = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    dtype = model.get_base_model().get_input_embeddings().weight.dtype
    reference = ReferenceEngine(model)
    limits = limits_of(dtype, weight.device.type)
    try:
        with untouched(model), engine.dropout_off(), reference.dropout_off():
            fill_zeros(model)
            found = [_beside(_pass(model, engine, batch), _pass(model, reference, batch), limits) for batch in batches]
    except torch.OutOfMemoryError:
        raise
    except KERNEL_ERRORS as error:
        failure = str(error).strip().split("\n")[0] or type(error).__name__
        return Agreement(math.inf, math.inf, math.inf, "", limits, failure)
    return Agreement(
        max(one.loss for one in found),
        max(one.gradient for one in found),
        max(one.matrix for one in found),
        max(found, key=lambda one: one.matrix).worst,
        limits,
    )


def _beside(
    found: tuple[float, dict[str, torch.Tensor]], wanted: tuple[float, dict[str, torch.Tensor]], limits: GradientLimits
) -> Agreement:
    """Loss and gradients of one batch beside the reference's; what is not finite counts as infinitely far."""
    names = list(wanted[1])
    size = torch.stack([wanted[1][name].norm() for name in names]).double()
    apart = torch.stack([(found[1][name] - wanted[1][name]).norm() for name in names]).double()
    tiny = torch.finfo(torch.float32).tiny
    matrices = (apart / torch.maximum(size, FLOOR * size.max()).clamp_min(tiny)).nan_to_num(math.inf)
    whole = apart.norm() / size.norm().clamp_min(tiny)
    worst = matrices.argmax()
    loss = abs(found[0] - wanted[0]) / max(abs(wanted[0]), tiny)
    gradient, matrix, number = torch.stack([whole.nan_to_num(math.inf), matrices[worst], worst.double()]).tolist()
    return Agreement(math.inf if math.isnan(loss) else loss, gradient, matrix, short_name(names[int(number)]), limits)


def _pass(model: Any, engine: Engine, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss, and the gradient of the mean loss for every adapter matrix; zero where there is none."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = engine.forward_backward(batch.scaled(1 / batch.weight), LIKELIHOOD).loss
    return loss.item(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def even_rows(examples: Sequence[Example], lengths: Sequence[int]) -> list[Example]:
    """The first rows' tokens as rows of one length, at most as asked, all trained: attention has a way of its own."""
    ids = np.concatenate([example.ids for example in examples[: 4 * len(lengths)]])
    length = max(2, min(*lengths, len(ids) // len(lengths)))
    return [Example(np.resize(ids[n * length :], length), ((1, length, 1.0),), "") for n in range(len(lengths))]


def short_rows(examples: Sequence[Example], lengths: Sequence[int], least: int = ENOUGH) -> list[Example]:
    """The first rows, each cut to a length; where fewer than `least` trained tokens are left, all become trained."""
    rows = [examples[n].cut(length) for n, length in enumerate(lengths[: len(examples)])]
    return [row if row.trained >= least else all_trained(row) for row in rows]


def all_trained(row: Example) -> Example:
    """The same row with a loss on every token."""
    return Example(row.ids, ((1, len(row.ids), 1.0),), row.place)


def short_name(parameter: str) -> str:
    """A parameter's name without what all of them share."""
    return parameter.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
