"""Norms of a step's gradients by decoder layer, for `grad_norm_by_layer` of metrics.jsonl.

A norm a tensor, from one call for all of them, joins the scalars that the loop reads once a step; squares are added up
by layer on the host. Where an engine lays all gradients into one buffer and a layer's lie side by side, one slice
stands for a layer. What belongs to no layer (embeddings, a head) is in `grad_norm` alone. Gradients that are released
within the backward are never there together, and have no such norms.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

_NUMBERED = re.compile(r"^(.*?)\.(\d+)\.")  # the first number in a name is its layer's


class LayerNorms:
    """Measures the gradients of a model's trained parameters.

    Args:
        parameters: trained parameters, by name.
        master: parameter of which they are views, with all gradients in its own; None: each has a gradient by itself.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], master: torch.nn.Parameter | None) -> None:
        found = {name: match for name in parameters if (match := _NUMBERED.match(name))}
        lists = Counter(match[1] for match in found.values())
        stack = lists.most_common(1)[0][0] if lists else ""  # the decoder's layers, not a head of two parts
        layers = {name: int(match[2]) for name, match in found.items() if match[1] == stack}
        self._parameters = [(layer, parameters[name]) for name, layer in layers.items()]
        self._master = master
        self._slices = [] if master is None else _slices(self._parameters, master)
        self._count = 1 + max(layers.values(), default=-1)
        self._layers: list[int] = []
        self.norms: Sequence[torch.Tensor] = ()

    def measure(self, is_logged: bool) -> None:
        """Launch the computation of a norm a tensor, in `norms`; nothing waits for it. Steps not logged have none."""
        self.norms = ()
        if not is_logged:
            return
        if self._slices and self._master is not None and self._master.grad is not None:
            self._layers = [layer for layer, _ in self._slices]
            gradients = [self._master.grad[part] for _, part in self._slices]
        else:
            held = [(layer, one.grad) for layer, one in self._parameters if one.grad is not None]
            self._layers, gradients = [layer for layer, _ in held], [gradient for _, gradient in held]
        if gradients:
            self.norms = torch._foreach_norm(gradients, 2, torch.float32)

    def by_layer(self, read: Sequence[float]) -> list[float | None]:
        """Add up what was read of `norms`; None: nothing is trained in a layer, or its norm is not finite."""
        squares: dict[int, float] = {}
        for layer, norm in zip(self._layers, read, strict=True):
            squares[layer] = squares.get(layer, 0.0) + norm * norm
        sums = [squares.get(layer, math.nan) for layer in range(self._count)]
        return [float(f"{math.sqrt(square):.4g}") if math.isfinite(square) else None for square in sums]


def _slices(
    parameters: Sequence[tuple[int, torch.nn.Parameter]], master: torch.nn.Parameter
) -> list[tuple[int, slice]]:
    """Return each layer's part of the buffer; empty: layers do not lie side by side, or lie elsewhere."""
    storage = master.untyped_storage().data_ptr()
    if any(parameter.untyped_storage().data_ptr() != storage for _, parameter in parameters):
        return []
    parts: list[tuple[int, slice]] = []
    for layer, one in sorted(parameters, key=lambda pair: pair[1].storage_offset()):
        start, end = one.storage_offset(), one.storage_offset() + one.numel()
        if parts and parts[-1][0] == layer and parts[-1][1].stop == start:
            parts[-1] = (layer, slice(parts[-1][1].start, end))
        else:
            parts.append((layer, slice(start, end)))
    return parts
