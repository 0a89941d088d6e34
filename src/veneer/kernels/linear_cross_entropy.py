"""Computes a linear layer and its cross-entropy together, without ever holding the logits of all tokens.

Logits are the largest tensor of a small step: 4 x 2048 tokens of a 128k vocabulary are 4 GB in float32. Here they exist
for one chunk of tokens at a time. The gradient of a token's loss with respect to its hidden state is known up to one
factor, so forward computes it while it holds the chunk's logits, and backward only scales it. The head is frozen; it
gets no gradient.

This is the torch twin; kernels for a GPU are tested against it.

On meta tensors, which have no data, one chunk stands for all that are alike, and `LISTENERS` are told for how many.

Shapes: N trained tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

CHUNK_BYTES = 64 * 2**20  # float32 logits held at a time
LISTENERS: list[Callable[[int], None]] = []  # called on meta tensors with the number of chunks that the next stands for


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of every token, float32, shape (N,).

    Args:
        hidden_ND: hidden states; the only input that gets a gradient.
        weight_VD: frozen weight of the head, in the dtype of hidden_ND.
        bias_V: frozen bias of the head, or None.
        targets_N: token ids, int64.
    """
    losses_N: torch.Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N)
    return losses_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
    ) -> torch.Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        losses_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND) if wants_gradient else None
        chunk = max(1, CHUNK_BYTES // (4 * len(weight_VD)))
        for start in chunk_starts(len(hidden_ND), chunk, hidden_ND.is_meta):
            part = slice(start, start + chunk)
            logits_nV = F.linear(hidden_ND[part], weight_VD, bias_V).float()
            logprobs_nV = torch.log_softmax(logits_nV, dim=-1)
            targets_n1 = targets_N[part, None]
            losses_N[part] = -logprobs_nV.gather(1, targets_n1).squeeze(1)
            if gradient_ND is not None:
                gradient_nV = logprobs_nV.exp_()
                gradient_nV.scatter_add_(1, targets_n1, gradient_nV.new_full(targets_n1.shape, -1.0))
                gradient_ND[part] = gradient_nV.to(weight_VD.dtype) @ weight_VD
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * grads[0][:, None]).to(gradient_ND.dtype), None, None, None


def chunk_starts(tokens: int, chunk: int, is_meta: bool) -> Iterator[int]:
    """Yield where chunks begin: all of them; on meta tensors the first, one for all between, and the last."""
    starts = range(0, tokens, chunk)
    if not is_meta or len(starts) < 4:
        yield from starts
        return
    # The second begins while the first one's tensors are held, as each of those that it stands for would.
    for start, times in ((starts[0], 1), (starts[1], len(starts) - 2), (starts[-1], 1)):
        for listener in LISTENERS:
            listener(times)
        yield start
