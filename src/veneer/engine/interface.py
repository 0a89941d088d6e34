"""What every engine does. The loop, the evaluation and the checks know nothing else of an engine."""

from typing import Protocol

import torch

from veneer.data import Batch


class Engine(Protocol):
    """Computes losses and gradients of an adapter on a frozen base model."""

    name: str
    isolates_documents: bool  # whether packed documents never see each other

    @property
    def master(self) -> torch.nn.Parameter | None:
        """One parameter of which all adapter parameters are views, where the engine lays them so."""
        ...

    def forward_backward(self, batch: Batch, scale: float) -> torch.Tensor:
        """Add the gradient of `scale` times the batch's summed loss to the adapter's parameters.

        The caller chooses the scale (1 / summed weights of the whole optimizer step's tokens), so that any split of a
        step into micro-batches gives the same gradient.

        Returns:
            The summed loss over trained tokens, each times its weight, unscaled; a scalar on the device, float64
            where it has that.
        """
        ...

    def losses(self, batch: Batch) -> torch.Tensor:
        """Summed weighted loss of each document, shape (documents,), in the same dtype; no gradients, dropout off."""
        ...
