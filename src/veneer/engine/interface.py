"""What every engine does. The loop, evaluation, verification and the plan know nothing else of an engine."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

from veneer.data.batch import Batch
from veneer.engine.objective import Objective, StepOutput, TrainedTokens
from veneer.engine.placement import MemoryPlacement


class BatchShapes(NamedTuple):
    """Tokens of the rows or documents in the batches of a run that need most memory.

    Attributes:
        largest: Of the rows of the largest micro-batch.
        varies: Whether micro-batches come in more than one shape.
        held_out: Of the rows of the largest held-out batch.
        documents: Of the documents of the micro-batch that holds most of them, where rows are packed.
    """

    largest: tuple[int, ...]
    varies: bool = False
    held_out: tuple[int, ...] = ()
    documents: tuple[int, ...] = ()


class Engine(Protocol):
    """Computes losses and gradients of an adapter on a frozen base model.

    Attributes:
        name: reference or fused.
        is_reference: Whether it is what others are compared with.
    """

    name: str
    is_reference: bool

    @property
    def master(self) -> torch.nn.Parameter | None:
        """One parameter of which all adapter parameters are views, where the engine lays them so."""
        ...

    def forward_backward(self, batch: Batch, objective: Objective) -> StepOutput:
        """Add the gradient of `batch.scale` times the batch's summed loss to the adapter's parameters.

        The caller chooses the scale (1 / summed weights of the whole optimizer step), so that any split of a step into
        micro-batches gives the same gradient. Documents of a batch never see each other.

        Returns:
            The summed loss and metrics, unscaled; on the device, float64 where it has that.
        """
        ...

    def token_logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probability of each trained token, in the batch's order and the same dtype; no gradients, dropout off."""
        ...

    def plan_memory(self, shapes: BatchShapes, gradient_checkpointing: bool | str, later_bytes: int) -> MemoryPlacement:
        """Choose where tensors live, and place them so; for before training, since gradients are lost.

        Args:
            shapes: lengths of the run's batches.
            gradient_checkpointing: the setting; auto: keep as much as the device's memory allows.
            later_bytes: what is still to come on the device, as the optimizer's states.

        Returns:
            The placement, where this engine, device or setting leaves nothing to choose as well.
        """
        ...

    def adapter_off(self) -> AbstractContextManager[None]:
        """Within the block the base alone answers, in generation and in the engine's losses."""
        ...

    def dropout_off(self) -> AbstractContextManager[None]:
        """Within the block training passes drop nothing: two engines never draw the same mask."""
        ...

    def describe(self) -> dict[str, Any]:
        """How it computes, for plan.json: `chunked_head`, whether only a part of the logits is there at a time."""
        ...


def document_losses(engine: Engine, batch: Batch) -> list[float]:
    """Weighted negative log-likelihood of each document."""
    tokens = TrainedTokens.of(batch, engine.token_logprobs(batch).cpu().double())
    losses: list[float] = tokens.sum_documents(-tokens.logprobs_N * tokens.weights_N).tolist()
    return losses
