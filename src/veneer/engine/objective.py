"""What training minimizes: a loss of the log-probabilities of a batch's trained tokens, on whichever engine.

An engine computes these, asks the objective for the loss and its derivative by each of them, scales the rows of the
head's gradient by that, and goes back: one forward and one backward pass for any such objective.

Shapes: N trained tokens, padding included; D documents, empty ones included.
"""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import ClassVar, NamedTuple, Protocol

import torch

from veneer.data.batch import Batch
from veneer.machine.device import bring


class TrainedTokens(NamedTuple):
    """The trained tokens of a batch, in its order, with padding behind them.

    Attributes:
        logprobs_N: log-probability of each, float64 where the device has it.
        weights_N: weight of each in the loss, float32; 0 for padding.
        index_N: position in the batch before each, int64.
        bounds: positions where documents begin, and where the last one ends; (D + 1,).
        values: what else `Batch.values` has of each.
    """

    logprobs_N: torch.Tensor
    weights_N: torch.Tensor
    index_N: torch.Tensor
    bounds: torch.Tensor
    values: Mapping[str, torch.Tensor]

    @staticmethod
    def of(batch: Batch, logprobs_N: torch.Tensor) -> "TrainedTokens":
        """Those of a batch on the host, on the device of their log-probabilities."""
        index_N = (batch.targets_T >= 0).nonzero().squeeze(1)
        to_device = partial(bring, device=logprobs_N.device)
        bounds = to_device(torch.tensor([0, *accumulate(batch.lengths)]))
        values = {name: to_device(value_T[index_N]) for name, value_T in batch.values.items()}
        return TrainedTokens(logprobs_N, to_device(batch.weights_T[index_N]), to_device(index_N), bounds, values)

    def sum_documents(self, values_N: torch.Tensor) -> torch.Tensor:
        """Sum of each document's values, added in a fixed order; (D,), 0 where nothing is trained."""
        offsets = torch.searchsorted(self._places(), self.bounds.long())
        return torch.segment_reduce(values_N, "sum", offsets=offsets, unsafe=True)  # a check would wait for the device

    def to_tokens(self, values_D: torch.Tensor) -> torch.Tensor:
        """Its document's value for each token; (N,)."""
        after = torch.searchsorted(self.bounds.long(), self._places(), right=True)
        return values_D[after.clamp_(max=len(values_D)) - 1]

    def _places(self) -> torch.Tensor:
        """Positions that rise to the end: those of padding are behind all others."""
        return torch.where(self.weights_N != 0, self.index_N, self.bounds[-1])


class StepOutput(NamedTuple):
    """Sums over a batch, scalars on the device: the loss, the weight to divide it and the metrics by, and these."""

    loss: torch.Tensor
    weight: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Objective(Protocol):
    """A pure function from log-probabilities to a loss. Passes are recorded with it and replayed for all that equal it.

    Attributes:
        is_weighted_sum: whether the loss is minus the weighted sum of log-probabilities: its derivative is known
            before the forward pass then.
    """

    is_weighted_sum: ClassVar[bool] = False

    def weight(self, batch: Batch) -> float:
        """The weight of a batch, before its pass."""
        ...

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor | None]:
        """Sums, and the loss's derivative by each log-probability; None for a weighted sum.

        It must not wait for the device. Padding and empty documents count nothing.
        """
        ...

    def held_out_metrics(self, loss: float) -> dict[str, float | None]:
        """What is logged beside the mean loss of held-out rows, which may be no finite number."""
        return {}


class NegativeLogLikelihood(Objective):
    """Minus the weighted sum of log-probabilities: what engines are compared and measured with."""

    is_weighted_sum = True

    def weight(self, batch: Batch) -> float:
        return batch.weight

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, None]:
        loss = -(tokens.logprobs_N * tokens.weights_N).sum()
        return StepOutput(loss, tokens.weights_N.sum(dtype=loss.dtype), {}), None


LIKELIHOOD = NegativeLogLikelihood()
