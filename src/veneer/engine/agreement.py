"""Whether an engine gives the reference engine's numbers on this model, this machine and these rows.

Losses are compared, and the gradient of every adapter matrix, with B filled so that A has a gradient too. In float32
both are nearly exact and so is the comparison. In 16 bits each of the two is off by one to three percent of a matrix's
gradient, so they differ by up to a twentieth; a wrong kernel is off by a third or more in all layers below it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from veneer.data import Batch
from veneer.data.batch import Example
from veneer.engine.interface import Engine
from veneer.engine.reference import ReferenceEngine
from veneer.engine.temporary import dropout_off, fill_b, untouched

FLOOR = 1e-3  # of the largest gradient: what is smaller moves nothing, and is compared with this much


class Limits(NamedTuple):
    """Largest relative differences of a healthy engine."""

    loss: float
    gradient: float


def limits_of(dtype: torch.dtype, device: str) -> Limits:
    """Limits of a compute precision; on a GPU products of float32 may round their inputs to 19 bits."""
    if dtype != torch.float32:
        return Limits(0.02, 0.1)
    return Limits(1e-3, 1e-3) if device == "cpu" else Limits(1e-3, 1e-2)


@dataclass(frozen=True)
class Agreement:
    """An engine beside the reference.

    Attributes:
        loss: Largest relative difference of a batch's loss.
        gradient: Largest of an adapter matrix's gradient, by norm; infinite where one is not finite.
        worst: The matrix with that difference.
        limits: Of both.
    """

    loss: float
    gradient: float
    worst: str
    limits: Limits

    @property
    def holds(self) -> bool:
        return self.loss <= self.limits.loss and self.gradient <= self.limits.gradient

    def describe(self) -> str:
        """For a person: what differs, and where most."""
        return (
            f"losses differ by {self.loss:.2g} (limit {self.limits.loss:.2g}), gradients by up to "
            f"{self.gradient:.2g} (limit {self.limits.gradient:.2g}), most in {self.worst}"
        )


def agree(model: Any, engine: Engine, batches: Sequence[Batch]) -> Agreement:
    """Compare an engine of a model with the reference engine of the same model.

    Adapter, random numbers and gradients' absence are afterwards as before. Dropout is off.
    """
    weight = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    dtype = model.get_base_model().get_input_embeddings().weight.dtype
    reference = ReferenceEngine(model)
    found = []
    with untouched(model), dropout_off(model, engine):
        fill_b(model)
        for batch in batches:
            loss, gradients = _pass(model, engine, batch)
            wanted_loss, wanted = _pass(model, reference, batch)
            size = torch.stack([wanted[name].norm() for name in wanted])
            apart = torch.stack([(gradients[name] - wanted[name]).norm() for name in wanted])
            relative = apart / torch.maximum(size, FLOOR * size.max()).clamp_min(torch.finfo(torch.float32).tiny)
            number = int(relative.nan_to_num(torch.inf).argmax())
            found.append(
                Agreement(
                    abs(loss - wanted_loss) / max(abs(wanted_loss), 1e-12),
                    float(relative.nan_to_num(torch.inf)[number]),
                    short_name(list(wanted)[number]),
                    limits_of(dtype, weight.device.type),
                )
            )
    loss = max((one.loss for one in found), key=lambda value: (value != value, value))
    worst = max(found, key=lambda one: one.gradient)
    return Agreement(loss, worst.gradient, worst.worst, worst.limits)


def _pass(model: Any, engine: Engine, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss, and the gradient of the mean loss for every adapter matrix; zero where there is none."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = engine.forward_backward(batch, 1 / batch.weight)
    return loss.item(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def short_rows(examples: Sequence[Example], lengths: Sequence[int]) -> list[Example]:
    """The first rows, each cut to a length; where nothing trained is left of one, all its tokens are trained."""
    rows = [examples[n].cut(length) for n, length in enumerate(lengths[: len(examples)])]
    return [row if row.trained else Example(row.ids, ((1, len(row.ids), 1.0),), row.place) for row in rows]


def short_name(parameter: str) -> str:
    """A parameter's name without what all of them share."""
    return parameter.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
