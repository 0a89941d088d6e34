"""Computes a linear layer and its cross-entropy together, as linear_cross_entropy.py, for a head that is trained.

The gradient of the weight adds up over tokens, each with a factor that only backward knows. So forward computes losses
alone, and backward makes the logits again, a chunk at a time: one product more, and never the logits of all tokens.
Sums over chunks are float32.

Shapes: N trained tokens, D model width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from veneer.kernels.linear_cross_entropy import chunk_starts

CHUNK_BYTES = 256 * 2**20  # float32 logits held at a time: each chunk adds to the whole gradient of the weight


def trained_head_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of every token, float32, shape (N,); hidden states, weight and bias get gradients.

    Args:
        hidden_ND: hidden states.
        weight_VD: weight of the head, in the dtype of hidden_ND.
        bias_V: bias of the head, or None.
        targets_N: token ids, int64.
    """
    losses_N: torch.Tensor = _TrainedHead.apply(hidden_ND, weight_VD, bias_V, targets_N)
    return losses_N


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        losses_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        for part in _chunks(hidden_ND, weight_VD):
            logprobs_nV = _logprobs(hidden_ND[part], weight_VD, bias_V)
            losses_N[part] = -logprobs_nV.gather(1, targets_N[part, None]).squeeze(1)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        of_hidden_ND = torch.empty_like(hidden_ND)
        of_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        of_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for part in _chunks(hidden_ND, weight_VD):
            of_logits_nV = _logprobs(hidden_ND[part], weight_VD, bias_V).exp_()
            targets_n1 = targets_N[part, None]
            of_logits_nV.scatter_add_(1, targets_n1, of_logits_nV.new_full(targets_n1.shape, -1.0))
            of_logits_nV *= grads[0][part, None]
            if of_bias_V is not None:
                of_bias_V += of_logits_nV.sum(0)
            of_logits_nV = of_logits_nV.to(weight_VD.dtype)
            of_hidden_ND[part] = of_logits_nV @ weight_VD
            of_weight_VD += of_logits_nV.T @ hidden_ND[part]
        return (
            of_hidden_ND,
            of_weight_VD.to(weight_VD.dtype),
            None if bias_V is None or of_bias_V is None else of_bias_V.to(bias_V.dtype),
            None,
        )


def _chunks(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> Iterator[slice]:
    chunk = max(1, CHUNK_BYTES // (4 * len(weight_VD)))
    for start in chunk_starts(len(hidden_ND), chunk, hidden_ND.is_meta):
        yield slice(start, start + chunk)


def _logprobs(hidden_nD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    return torch.log_softmax(F.linear(hidden_nD, weight_VD, bias_V).float(), dim=-1)
