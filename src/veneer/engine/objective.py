"""Objectives of training: a loss as a function of the log-probabilities of a batch's trained tokens.

An engine computes these, asks the objective for the loss and its derivative by each of them, scales the rows of the
head's gradient by it, and runs backward: one forward and one backward pass for any such objective.

Shapes: N trained tokens, padding included; D documents, empty ones included.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from veneer.data.batch import Batch
from veneer.machine.device import to_device


class TrainedTokens(NamedTuple):
    """The trained tokens of a batch, in its order, with padding after them.

    Attributes:
        logprobs_N: log-probability of each, float64 where the device has it.
        weights_N: weight of each in the loss, float32; 0 for padding.
        index_N: position in the batch before each, int64.
        bounds: positions at which documents begin and the last one ends; (D + 1,).
        values: further values of each, from `Batch.values`.
    """

    logprobs_N: torch.Tensor
    weights_N: torch.Tensor
    index_N: torch.Tensor
    bounds: torch.Tensor
    values: Mapping[str, torch.Tensor]

    @staticmethod
    def of(batch: Batch, logprobs_N: torch.Tensor) -> "TrainedTokens":
        """Move those of a batch on the host to the device of their log-probabilities."""
        index_N = (batch.targets_T >= 0).nonzero().squeeze(1)
        move = partial(to_device, device=logprobs_N.device)
        bounds = move(torch.tensor([0, *accumulate(batch.lengths)]))
        values = {name: move(value_T[index_N]) for name, value_T in batch.values.items()}
        return TrainedTokens(logprobs_N, move(batch.weights_T[index_N]), move(index_N), bounds, values)

    @staticmethod
    def on_host(batch: Batch) -> "TrainedTokens":
        """Those of a batch before its pass, whose log-probabilities are not known: 0."""
        return TrainedTokens.of(batch, torch.zeros(batch.trained, dtype=torch.float64))

    def sum_documents(self, values_N: torch.Tensor) -> torch.Tensor:
        """Sum each document's values in a fixed order; (D,), 0 where nothing is trained."""
        offsets = torch.searchsorted(self._positions(), self.bounds.long())
        return torch.segment_reduce(values_N, "sum", offsets=offsets, unsafe=True)  # a check would wait for the device

    def to_tokens(self, values_D: torch.Tensor) -> torch.Tensor:
        """Return its document's value for each token; (N,)."""
        after = torch.searchsorted(self.bounds.long(), self._positions(), right=True)
        return values_D[after.clamp_(max=len(values_D)) - 1]

    def _positions(self) -> torch.Tensor:
        """Return the positions in ascending order: padding comes after all others."""
        return torch.where(self.weights_N != 0, self.index_N, self.bounds[-1])


class StepOutput(NamedTuple):
    """Sums over a batch as scalars on the device: loss and metrics, and the weight that both are divided by.

    A metric that a step has nothing for is NaN.
    """

    loss: torch.Tensor
    weight: torch.Tensor
    metrics: dict[str, torch.Tensor]

    def on_cpu(self) -> "StepOutput":
        """Return it in the host's memory."""
        metrics = {name: value.cpu() for name, value in self.metrics.items()}
        return StepOutput(self.loss.cpu(), self.weight.cpu(), metrics)


class Objective(Protocol):
    """A pure function from log-probabilities to a loss. Recorded passes are replayed for objectives that equal it.

    Attributes:
        is_weighted_sum: whether the loss is minus the weighted sum of log-probabilities, so that its derivative is
            known before the forward pass.
        documents_per_row: documents of a row of the data, which it reads together: 2 of pairs, chosen and rejected.
        needs_reference: whether it reads `reference` of `TrainedTokens.values`: the summed log-probability of each
            document as training began, at its first trained token, and 0 at the others.
        may_lack_reference: whether its loss has a meaning where all of `reference` is 0.
        needs_kl: whether it reads `kl` of `TrainedTokens.values`: the estimated KL divergence from the reference, at
            every token.
    """

    is_weighted_sum: ClassVar[bool] = False
    documents_per_row: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False

    @property
    def may_lack_reference(self) -> bool:
        return False

    def weight(self, batch: Batch) -> float:
        """Return the weight of a batch, before its pass."""
        ...

    def step_values(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return values that all tokens are given, by name, of all batches of an optimizer step; none is below 0."""
        return {}

    def begin_step(self, engine: Any, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Return a step's micro-batches; the engine sees all before their passes, where the loss is of all together."""
        return batches

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor | None]:
        """Return the sums, and the loss's derivative by each log-probability; None for a weighted sum.

        It must not wait for the device. Padding and empty documents must not count.
        """
        ...

    def held_out_metrics(self, loss: float) -> dict[str, float | None]:
        """Return metrics to log beside the mean loss of held-out rows, which may not be finite."""
        return {}

    def start_loss(self) -> float | None:
        """Return the mean loss where the model is the reference; None: it depends on the rows."""
        return None


class NegativeLogLikelihood(Objective):
    """Minus the weighted sum of log-probabilities; engines are compared and measured with it."""

    is_weighted_sum = True

    def weight(self, batch: Batch) -> float:
        return batch.weight

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, None]:
        loss = -(tokens.logprobs_N * tokens.weights_N).sum()
        return StepOutput(loss, tokens.weights_N.sum(dtype=loss.dtype), {}), None


LIKELIHOOD = NegativeLogLikelihood()
