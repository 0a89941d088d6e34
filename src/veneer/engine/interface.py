"""The protocol of engines. The loop, evaluation, verification and the plan use nothing else of an engine."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

from veneer.data.batch import Batch
from veneer.engine.objective import Objective, StepOutput, TrainedTokens
from veneer.engine.placement import H100, MemoryPlacement, Rates


class BatchShapes(NamedTuple):
    """The batches of a run that need most memory.

    Attributes:
        largest: lengths of the rows of the largest micro-batch.
        varies: whether micro-batches have more than one shape.
        held_out: lengths of the rows of the largest held-out batch.
        documents: lengths of the documents of the micro-batch with most of them, where rows are packed.
        shared: `Batch.shared` of the largest micro-batch.
    """

    largest: tuple[int, ...]
    varies: bool = False
    held_out: tuple[int, ...] = ()
    documents: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()


class Engine(Protocol):
    """Computes losses and gradients of an adapter on a frozen base model.

    Attributes:
        name: reference or fused.
        is_reference: whether it is the engine that others are compared with.
        shares_prompts: whether it leaves out what documents of a batch share (`Batch.shared`); others compute it again.
    """

    name: str
    is_reference: bool

    @property
    def shares_prompts(self) -> bool: ...

    @property
    def master(self) -> torch.nn.Parameter | None:
        """One parameter of which all adapter parameters are views; None where the engine has none."""
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
        """Return the log-probability of each trained token, in the batch's order; no gradients, dropout off."""
        ...

    def plan_memory(
        self,
        shapes: BatchShapes,
        gradient_checkpointing: bool | str,
        later_bytes: int,
        budget_bytes: int | None = None,
        rates: Rates = H100,
    ) -> MemoryPlacement:
        """Choose a placement of tensors, and apply it; call it before training, since it drops gradients.

        Args:
            shapes: lengths of the run's batches.
            gradient_checkpointing: the setting; auto: keep as much as the device's memory allows.
            later_bytes: memory of the device to reserve for later, as for the optimizer's states.
            budget_bytes: memory of the device that tensors may take, those allocated now included; None: what is free.
            rates: speeds of the device and its link, and the host's memory.

        Returns:
            The placement, also where this engine, device or setting leaves no choice.

        Raises:
            torch.OutOfMemoryError: no placement fits.
        """
        ...

    def tighten(self) -> str | None:
        """Apply the next placement that takes less memory, after an out-of-memory error; drop gradients first.

        Returns:
            What changed; None: there is no such placement.
        """
        ...

    def adapter_off(self) -> AbstractContextManager[None]:
        """Within the context, the base is used without its adapter, in generation and in the engine's losses."""
        ...

    def dropout_off(self) -> AbstractContextManager[None]:
        """Within the context, training passes use no dropout: two engines never draw the same mask."""
        ...

    def describe(self) -> dict[str, Any]:
        """Describe it for plan.json: `chunked_head`, whether logits are computed a chunk at a time."""
        ...


def document_losses(engine: Engine, batch: Batch) -> list[float]:
    """Return the weighted negative log-likelihood of each document."""
    tokens = TrainedTokens.of(batch, engine.token_logprobs(batch).cpu().double())
    losses: list[float] = tokens.sum_documents(-tokens.logprobs_N * tokens.weights_N).tolist()
    return losses
