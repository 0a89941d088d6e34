"""Residual addition and RMSNorm (arXiv 1910.07467) in one pass, and the backward of the norm.

A block begins with x + delta, where delta is what the block before it, or its own attention, adds to the residual
stream; then it normalizes. Both in one kernel read and write each tensor once. Gemma 2 normalizes delta too, before it
is added. All arithmetic is float32, rounded once at the end; Llama's own code rounds before it multiplies by the
weight, which is one rounding more.

Shapes: T tokens, D model width. Rows may lie apart (a stride larger than D), since activations carry the adapters'
columns behind them.
"""

from typing import Any

import torch

from veneer.kernels.launch import power_of_2, runs_triton, tl, triton


def rms_norm(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    eps: float,
    offset: float,
    y_TD: torch.Tensor,
    post_D: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = norm(x + delta) * (weight + offset), written to `y_TD`.

    Args:
        x_TD: The residual stream.
        delta_TD: Added to it first, or None.
        weight_D: The norm's weight.
        eps: Added to the mean square.
        offset: 1 where the weight is stored as its difference from 1 (Gemma), else 0.
        y_TD: Filled; its rows may lie apart.
        post_D: Weight of a norm on delta itself (Gemma 2), or None.

    Returns:
        x + delta (x itself where delta is None), and 1 / root mean square of each of its rows, float32, shape (T,).
    """
    T, D = x_TD.shape
    if not runs_triton(x_TD):
        return _rms_norm_torch(x_TD, delta_TD, weight_D, eps, offset, y_TD, post_D)
    sum_TD = x_TD if delta_TD is None else torch.empty_like(x_TD)
    rstd_T = torch.empty(T, dtype=torch.float32, device=x_TD.device)
    block = power_of_2(D)
    _forward[(T,)](
        x_TD, x_TD if delta_TD is None else delta_TD, weight_D, weight_D if post_D is None else post_D,
        sum_TD, y_TD, rstd_T, D, y_TD.stride(0), eps, offset,
        HAS_DELTA=delta_TD is not None, HAS_POST=post_D is not None,
        BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return sum_TD, rstd_T


def rms_norm_backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor | None,
    eps: float,
    offset: float,
    add_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the norm's input, plus `add_TD` (the gradient that goes past the norm).

    Args:
        dy_TD: Gradient of the output.
        x_TD: The input.
        rstd_T: As `rms_norm` returned it; None: computed anew.
        add_TD: Added, and overwritten with the result (rows may lie apart); None: the result overwrites `dy_TD`.

    Returns:
        The tensor that was overwritten.
    """
    T, D = x_TD.shape
    out_TD = dy_TD if add_TD is None else add_TD
    if not runs_triton(x_TD):
        return _rms_norm_backward_torch(dy_TD, x_TD, weight_D, eps, offset, out_TD, add_TD is not None)
    block = power_of_2(D)
    _backward[(T,)](
        dy_TD, x_TD, weight_D, x_TD if rstd_T is None else rstd_T, out_TD, D, out_TD.stride(0), eps, offset,
        HAS_RSTD=rstd_T is not None, HAS_ADD=add_TD is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out_TD


def _normalize(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, offset: float) -> tuple[Any, Any]:
    wide_TD = x_TD.float()
    rstd_T = torch.rsqrt(wide_TD.pow(2).mean(-1) + eps)
    return wide_TD * rstd_T[:, None] * (weight_D.float() + offset), rstd_T


def _rms_norm_torch(
    x_TD: torch.Tensor, delta_TD: Any, weight_D: Any, eps: float, offset: float, y_TD: Any, post_D: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    sum_TD = x_TD
    if delta_TD is not None:
        wide_TD = delta_TD.float() if post_D is None else _normalize(delta_TD, post_D, eps, offset)[0]
        sum_TD = (x_TD.float() + wide_TD).to(x_TD.dtype)
    wide_TD, rstd_T = _normalize(sum_TD, weight_D, eps, offset)
    y_TD.copy_(wide_TD)
    return sum_TD, rstd_T


def _rms_norm_backward_torch(
    dy_TD: Any, x_TD: Any, weight_D: Any, eps: float, offset: float, out_TD: Any, adds: bool
) -> torch.Tensor:
    wide_TD = x_TD.float()
    rstd_T1 = torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + eps)
    unit_TD = wide_TD * rstd_T1
    g_TD = dy_TD.float() * (weight_D.float() + offset)
    dx_TD = rstd_T1 * (g_TD - unit_TD * (g_TD * unit_TD).mean(-1, keepdim=True))
    result: torch.Tensor = out_TD.copy_(out_TD.float() + dx_TD if adds else dx_TD)
    return result


@triton.jit
def _forward(
    x, delta, weight, post, total, y, rstd, D, stride_y, eps, offset,
    HAS_DELTA: tl.constexpr, HAS_POST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    row = tl.load(x + t * D + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        added = tl.load(delta + t * D + d, mask=inside, other=0.0).to(tl.float32)
        if HAS_POST:
            scale = tl.rsqrt(tl.sum(added * added) / D + eps)
            added = added * scale * (tl.load(post + d, mask=inside, other=0.0).to(tl.float32) + offset)
        row = (row + added).to(total.dtype.element_ty)
        tl.store(total + t * D + d, row, mask=inside)
        row = row.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row) / D + eps)
    tl.store(rstd + t, inverse)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y + t * stride_y + d, (row * inverse * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, x, weight, rstd, out, D, out_stride, eps, offset,
    HAS_RSTD: tl.constexpr, HAS_ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    row = tl.load(x + t * D + d, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32) + offset
    g = tl.load(dy + t * D + d, mask=inside, other=0.0).to(tl.float32) * w
    inverse = tl.load(rstd + t) if HAS_RSTD else tl.rsqrt(tl.sum(row * row) / D + eps)
    unit = row * inverse
    dx = inverse * (g - unit * (tl.sum(g * unit) / D))
    if HAS_ADD:
        dx += tl.load(out + t * out_stride + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * out_stride + d, dx.to(out.dtype.element_ty), mask=inside)
