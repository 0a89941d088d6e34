"""Checks that an engine computes the same numbers as the reference engine on this model, machine and rows.

It compares the loss, the gradient of all adapters together, the gradient of every kind of matrix (that of all layers)
and of every single one, with B filled so that A has a gradient too. In float32 both engines are nearly exact and so is
the comparison. In bfloat16 each is off the exact gradient by some 4% on the whole, and two correct ones differ by up to
0.6 in the keys of the first layers, whose gradients are small and the sum of large ones (SmolLM2-135M), but by 0.2 in
the keys of all layers. A wrong kernel is off by half or more in its own kind of matrix, or by a third in all below it;
weights or adapters of another layer leave nothing right in theirs.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from veneer.data.batch import Batch, Example
from veneer.engine.interface import Engine
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.engine.temporary import fill_zeros, preserve_adapter
from veneer.kernels.launch import KERNEL_ERRORS

ALL_LAYERS = " of all layers"
FLOOR = 1e-3  # share of the largest gradient; smaller gradients are compared relative to this

MIN_TRAINED = 32  # trained tokens a row; rounding errors of fewer do not cancel


class GradientLimits(NamedTuple):
    """Limits on the relative differences in the loss, in all gradients as one vector, and in those of a matrix.

    Attributes:
        loss: limit of the loss.
        gradient: limit of all gradients.
        matrix: limit of a kind of matrix in all layers.
        single: limit of a single matrix, as a multiple of that.
    """

    loss: float
    gradient: float
    matrix: float
    single: float = 1.0


def limits_of(dtype: torch.dtype, device: str) -> GradientLimits:
    """Return the limits for a compute dtype; a GPU may round the inputs of float32 products to 19 bits (TF32)."""
    if dtype != torch.float32:
        return GradientLimits(0.02, 0.2, 0.4, 2.25)
    return GradientLimits(1e-3, 1e-3, 1e-3) if device == "cpu" else GradientLimits(1e-3, 1e-2, 1e-2)


@dataclass(frozen=True)
class Agreement:
    """The result of comparing an engine with the reference engine.

    Attributes:
        loss: relative difference of a batch's loss.
        gradient: relative difference of all adapters' gradients as one vector, by norm.
        matrix: largest relative difference of the gradient of a kind of matrix, by norm, or of a single one over
            `limits.single`; infinite where one is not finite.
        worst: name of the matrix or the kind with that difference.
        limits: limits of the three.
        failure: reason why the engine gave no numbers at all; None: it gave some.
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
        return all(value <= limit for value, limit in zip(found, self.limits[:3], strict=True))

    def describe(self) -> str:
        """Describe the differences and their limits in one line."""
        if self.failure is not None:
            return self.failure
        loss, gradient, matrix, single = self.limits
        times = 1.0 if self.worst.endswith(ALL_LAYERS) else single
        return (
            f"losses differ by {self.loss:.2g} (limit {loss:g}), gradients by {self.gradient:.2g} ({gradient:g}), "
            f"most in {self.worst} by {self.matrix * times:.2g} "
            f"({matrix * times:g})"
        )


def agree(model: Any, engine: Engine, batches: Sequence[Batch]) -> Agreement:
    """Compare an engine of a model with the reference engine of the same model.

    The adapter and the state of the random number generators are restored afterwards. Dropout is off. A kernel that
    this machine cannot run counts as a disagreement.

    Raises:
        torch.OutOfMemoryError: memory does not suffice.
    """
    weight = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    dtype = model.get_base_model().get_input_embeddings().weight.dtype
    reference = ReferenceEngine(model)
    limits = limits_of(dtype, weight.device.type)
    try:
        with preserve_adapter(model), engine.dropout_off(), reference.dropout_off():
            fill_zeros(model)
            found = [_compare(_pass(model, engine, batch), _pass(model, reference, batch), limits) for batch in batches]
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


def _compare(
    found: tuple[float, dict[str, torch.Tensor]], wanted: tuple[float, dict[str, torch.Tensor]], limits: GradientLimits
) -> Agreement:
    """Compare loss and gradients of one batch with the reference's; a value that is not finite differs infinitely."""
    names = list(wanted[1])
    size = torch.stack([wanted[1][name].norm() for name in names]).double()
    apart = torch.stack([(found[1][name] - wanted[1][name]).norm() for name in names]).double()
    tiny = torch.finfo(torch.float32).tiny
    floor = FLOOR * size.max()
    singles = (apart / torch.maximum(size, floor).clamp_min(tiny)).nan_to_num(math.inf) / limits.single
    kinds = list(dict.fromkeys(map(_kind, names)))
    of_kind = torch.tensor([kinds.index(_kind(name)) for name in names], device=size.device)
    sums = [torch.zeros_like(size).index_add(0, of_kind, x.square())[: len(kinds)].sqrt() for x in (apart, size)]
    together = (sums[0] / torch.maximum(sums[1], floor).clamp_min(tiny)).nan_to_num(math.inf)
    whole = apart.norm() / size.norm().clamp_min(tiny)
    matrices = torch.cat([singles, together])
    worst = matrices.argmax()
    loss = abs(found[0] - wanted[0]) / max(abs(wanted[0]), tiny)
    gradient, matrix, number = torch.stack([whole.nan_to_num(math.inf), matrices[worst], worst.double()]).tolist()
    name = [*map(short_name, names), *(kind + ALL_LAYERS for kind in kinds)][int(number)]
    return Agreement(math.inf if math.isnan(loss) else loss, gradient, matrix, name, limits)


def _kind(parameter: str) -> str:
    """Return what matrices of all layers have in common: `self_attn.k_proj.lora_A`."""
    return re.sub(r".*\.\d+\.", "", short_name(parameter))


def _pass(model: Any, engine: Engine, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss, and the gradient of the mean loss for every adapter matrix; zeros where it has none."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = engine.forward_backward(batch.scaled(1 / batch.weight), LIKELIHOOD).loss
    return loss.item(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def even_rows(examples: Sequence[Example], lengths: Sequence[int]) -> list[Example]:
    """Cut the first rows into rows of one length, all trained: attention may use another backend for these."""
    ids = np.concatenate([example.ids for example in examples[: 4 * len(lengths)]])
    length = max(2, min(*lengths, len(ids) // len(lengths)))
    return [Example(np.resize(ids[n * length :], length), ((1, length, 1.0),), "") for n in range(len(lengths))]


def pair(examples: Sequence[Example], lengths: tuple[int, int]) -> list[Example]:
    """Cut the first rows to two documents that begin alike, with half of the shorter one, and train what follows."""
    ids = np.resize(np.concatenate([example.ids for example in examples[:8]]), sum(lengths))
    prompt = min(lengths) // 2
    answers = ids[prompt : lengths[0]], ids[lengths[0] : lengths[0] + lengths[1] - prompt]
    documents = [np.concatenate([ids[:prompt], answer]) for answer in answers]
    return [Example(document, ((prompt, len(document), 1.0),), "") for document in documents]


def short_rows(examples: Sequence[Example], lengths: Sequence[int], least: int = MIN_TRAINED) -> list[Example]:
    """Cut the first rows to given lengths; where fewer than `least` trained tokens are left, train all tokens."""
    rows = [examples[n].cut(length) for n, length in enumerate(lengths[: len(examples)])]
    return [row if row.trained >= least else all_trained(row) for row in rows]


def all_trained(row: Example) -> Example:
    """Return the same row with a loss on every token."""
    return Example(row.ids, ((1, len(row.ids), 1.0),), row.place)


def within_vocabulary(rows: Sequence[Example], model: Any) -> list[Example]:
    """Replace tokens for which a model has no embeddings by others; it has all, but for `first_blocks`."""
    size = len(model.get_input_embeddings().weight)
    return [replace(row, ids=row.ids % size) for row in rows]


def short_name(parameter: str) -> str:
    """Return a parameter's name without the prefix and suffixes that all of them share."""
    return parameter.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
