"""Computes the cross-entropy of logits, and overwrites the logits with their gradient.

The head's logits are the largest tensor of a step; nothing else of their size is allocated. A soft cap on them (Gemma
2: cap * tanh(logits / cap)) is part of both.

Shapes: N tokens, V vocabulary.
"""

import torch

from veneer.kernels.launch import launch, runs_triton, tl, triton

BLOCK = 8192


def softmax_loss(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    factor_N: torch.Tensor,
    losses_N: torch.Tensor,
    cap: float = 0.0,
    gradient: bool = True,
) -> None:
    """Compute losses of tokens, and replace the logits by their gradients.

    Args:
        logits_NV: logits, overwritten with factor * d loss / d logits, where `gradient`.
        targets_N: token ids, int64; negative: no token, loss and gradient 0.
        factor_N: factor of each token's loss in the gradient, float32.
        losses_N: output, each token's own loss, float32.
        cap: soft cap of the logits; 0: none.
        gradient: whether to compute the gradient.
    """
    N, V = logits_NV.shape
    if not runs_triton(logits_NV):
        raw_NV = logits_NV.float()
        tanh_NV = torch.tanh(raw_NV / cap) if cap else None
        values_NV = raw_NV if tanh_NV is None else tanh_NV * cap
        logprobs_NV = torch.log_softmax(values_NV, dim=-1)
        is_token_N = targets_N >= 0
        target_N1 = targets_N.clamp(min=0)[:, None]
        losses_N.copy_(torch.where(is_token_N, -logprobs_NV.gather(1, target_N1).squeeze(1), 0.0))
        if gradient:
            grad_NV = logprobs_NV.exp_()
            grad_NV.scatter_add_(1, target_N1, torch.full_like(target_N1, -1.0, dtype=grad_NV.dtype))
            if tanh_NV is not None:
                grad_NV *= 1 - tanh_NV * tanh_NV
            logits_NV.copy_(grad_NV * torch.where(is_token_N, factor_N, 0.0)[:, None])
        return
    launch(_softmax_loss, (N,), (logits_NV, logits_NV) if gradient else ())(
        logits_NV, targets_N, factor_N, losses_N, V, logits_NV.stride(0), cap,
        HAS_CAP=cap > 0, GRADIENT=gradient, BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=16,
    )  # fmt: skip


@triton.jit
def _softmax_loss(
    logits, targets, factor, losses, V, stride, cap, HAS_CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    target = tl.load(targets + n)
    columns = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        v = start + columns
        x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
        if HAS_CAP:
            x = tl.where(v < V, cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0), float("-inf"))
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, axis=0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), axis=0))
    is_token = target >= 0
    own = tl.load(row + tl.maximum(target, 0)).to(tl.float32)
    if HAS_CAP:
        own = cap * (2.0 * tl.sigmoid(2.0 * own / cap) - 1.0)
    tl.store(losses + n, tl.where(is_token, log_sum - own, 0.0))
    if GRADIENT:
        tl.debug_barrier()
        scale = tl.where(is_token, tl.load(factor + n), 0.0)
        for start in range(0, V, BLOCK):
            v = start + columns
            x = tl.load(row + v, mask=v < V, other=0.0).to(tl.float32)
            slope = tl.full((BLOCK,), 1.0, dtype=tl.float32)
            if HAS_CAP:
                th = 2.0 * tl.sigmoid(2.0 * x / cap) - 1.0
                slope = 1.0 - th * th
                x = cap * th
            grad = (tl.exp(x - log_sum) - tl.where(v == target, 1.0, 0.0)) * slope * scale
            tl.store(row + v, grad.to(logits.dtype.element_ty), mask=v < V)
