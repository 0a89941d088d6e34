"""Computes residual addition and RMSNorm (arXiv 1910.07467) in one pass, and the backward of the norm.

A block begins with x + delta, where delta is the output of the block before it, or of its own attention; then it
normalizes. One kernel for both reads and writes each tensor once. Gemma 2 normalizes delta too, before it is added. The
adapters' part of delta (or of the incoming gradient) may still have to be added: see `update`. All arithmetic is
float32, rounded once at the end; Llama's own code rounds before it multiplies by the weight, which is one rounding
more.

A program holds one row in registers; with an update it holds several, which share the reading of the adapter's rows.
Normalized activations are recomputed from the saved 1 / root mean square, so that they are equal bit for bit.

Shapes: T tokens, D model width. Tensors may have any row stride, columns are dense.
"""

from typing import Any

import torch

from veneer.kernels.column_scale import ColumnScale, scaled
from veneer.kernels.launch import launch, power_of_2, runs_triton, tl, triton
from veneer.kernels.update import Update, updated

ROWS = 2  # rows of a program with an update
ELEMENTS = 32  # elements of a tensor per thread


def rms_norm(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor | None,
    weight_D: torch.Tensor,
    eps: float,
    offset: float,
    y_TD: torch.Tensor,
    post_D: torch.Tensor | None = None,
    update: Update | None = None,
    scale: ColumnScale | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute y = norm(x + delta) * (weight + offset) into `y_TD`.

    Args:
        x_TD: residual stream; contiguous.
        delta_TD: addition to it, or None.
        weight_D: weight of the norm.
        eps: epsilon, added to the mean square.
        offset: 1 where the weight is stored as its difference from 1 (Gemma), else 0.
        y_TD: output.
        post_D: weight of a norm on delta itself (Gemma 2), or None.
        update: update still to be added to delta; not together with `post_D`.
        scale: scale of delta's columns, with the update in it.

    Returns:
        x + delta (x itself where delta is None), and 1 / root mean square of each of its rows, float32, shape (T,).
    """
    T, D = x_TD.shape
    assert post_D is None or update is None
    if not runs_triton(x_TD):
        return _rms_norm_torch(x_TD, delta_TD, weight_D, eps, offset, y_TD, post_D, update, scale)
    sum_TD = x_TD if delta_TD is None else torch.empty_like(x_TD)
    rstd_T = torch.empty(T, dtype=torch.float32, device=x_TD.device)
    columns = (weight_D, weight_D) if scale is None else scale
    if update is not None and delta_TD is not None:
        launch(_forward_update, (triton.cdiv(T, ROWS),))(
            x_TD, delta_TD, weight_D, *columns, sum_TD, y_TD, rstd_T, *update,
            update.u_TR.stride(0), update.b_RN.stride(0), T, D, delta_TD.stride(0), y_TD.stride(0), eps, offset,
            RANKS=len(update.b_RN), HAS_SCALE=scale is not None, **_rows(D),
        )  # fmt: skip
        return sum_TD, rstd_T
    block = power_of_2(D)
    launch(_forward, (T,))(
        x_TD, x_TD if delta_TD is None else delta_TD, weight_D, weight_D if post_D is None else post_D,
        *columns, sum_TD, y_TD, rstd_T, D, 0 if delta_TD is None else delta_TD.stride(0), y_TD.stride(0), eps, offset,
        HAS_DELTA=delta_TD is not None, HAS_POST=post_D is not None, HAS_SCALE=scale is not None,
        BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return sum_TD, rstd_T


def normalize(
    x_TD: torch.Tensor, rstd_T: torch.Tensor, weight_D: torch.Tensor, offset: float, y_TD: torch.Tensor
) -> None:
    """Compute y = x * rstd * (weight + offset), bit for bit as `rms_norm` did."""
    T, D = x_TD.shape
    if not runs_triton(x_TD):
        y_TD.copy_(x_TD.float() * rstd_T[:, None] * (weight_D.float() + offset))
        return
    block = power_of_2(D)
    launch(_normalize, (T,))(
        x_TD, rstd_T, weight_D, y_TD, D, x_TD.stride(0), y_TD.stride(0), offset, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip


def rms_norm_backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor | None,
    eps: float,
    offset: float,
    add_TD: torch.Tensor | None = None,
    update: Update | None = None,
) -> torch.Tensor:
    """Compute the gradient of the norm's input, plus `add_TD` (the gradient of the residual stream).

    Args:
        dy_TD: gradient of the output.
        x_TD: input; contiguous.
        rstd_T: result of `rms_norm`; None: it is recomputed.
        add_TD: gradient to add, overwritten with the result; None: the result overwrites `dy_TD`.
        update: update still to be added to dy; needs `rstd_T` and `add_TD`.

    Returns:
        The tensor that was overwritten.
    """
    T, D = x_TD.shape
    out_TD = dy_TD if add_TD is None else add_TD
    if not runs_triton(x_TD):
        return _rms_norm_backward_torch(updated(dy_TD, update), x_TD, weight_D, rstd_T, eps, offset, out_TD, add_TD)
    if update is not None:
        assert rstd_T is not None
        assert add_TD is not None
        launch(_backward_update, (triton.cdiv(T, ROWS),), (out_TD,))(
            dy_TD, x_TD, weight_D, rstd_T, out_TD, *update, update.u_TR.stride(0), update.b_RN.stride(0), T, D,
            dy_TD.stride(0), out_TD.stride(0), offset, RANKS=len(update.b_RN), **_rows(D),
        )  # fmt: skip
        return out_TD
    block = power_of_2(D)
    launch(_backward, (T,), (out_TD,))(
        dy_TD, x_TD, weight_D, x_TD if rstd_T is None else rstd_T, out_TD, D, dy_TD.stride(0), out_TD.stride(0), eps,
        offset, HAS_RSTD=rstd_T is not None, HAS_ADD=add_TD is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out_TD


def _rows(width: int) -> dict[str, int]:
    """Return the constants of a program that holds several rows."""
    block = power_of_2(width)
    return {"ROWS": ROWS, "BLOCK": block, "num_warps": min(16, max(1, ROWS * block // (32 * ELEMENTS)))}


def _rms_norm_torch(
    x_TD: torch.Tensor,
    delta_TD: Any,
    weight_D: Any,
    eps: float,
    offset: float,
    y_TD: Any,
    post_D: Any,
    update: Any,
    scale: ColumnScale | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    sum_TD = x_TD
    if delta_TD is not None:
        wide_TD = scaled(updated(delta_TD, update), scale)
        if post_D is not None:
            wide_TD = wide_TD * _rstd(wide_TD, eps)[:, None] * (post_D.float() + offset)
        sum_TD = (x_TD.float() + wide_TD).to(x_TD.dtype)
    rstd_T = _rstd(sum_TD.float(), eps)
    normalize(sum_TD, rstd_T, weight_D, offset, y_TD)
    return sum_TD, rstd_T


def _rstd(wide_TD: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(wide_TD.pow(2).mean(-1) + eps)


def _rms_norm_backward_torch(
    dy_TD: Any, x_TD: Any, weight_D: Any, rstd_T: Any, eps: float, offset: float, out_TD: Any, add_TD: Any
) -> torch.Tensor:
    wide_TD = x_TD.float()
    rstd_T1 = (_rstd(wide_TD, eps) if rstd_T is None else rstd_T)[:, None]
    unit_TD = wide_TD * rstd_T1
    g_TD = dy_TD * (weight_D.float() + offset)
    dx_TD = rstd_T1 * (g_TD - unit_TD * (g_TD * unit_TD).mean(-1, keepdim=True))
    result: torch.Tensor = out_TD.copy_(dx_TD if add_TD is None else add_TD.float() + dx_TD)
    return result


@triton.jit
def _forward(
    x, delta, weight, post, factor, shift, total, y, rstd, D, delta_t, y_t, eps, offset,
    HAS_DELTA: tl.constexpr, HAS_POST: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    row = tl.load(x + t * D + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        added = tl.load(delta + t * delta_t + d, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            added = added * tl.load(factor + d, mask=inside, other=0.0) + tl.load(shift + d, mask=inside, other=0.0)
        if HAS_POST:
            scale = tl.rsqrt(tl.sum(added * added) / D + eps)
            added = added * scale * (tl.load(post + d, mask=inside, other=0.0).to(tl.float32) + offset)
        row = (row + added).to(total.dtype.element_ty)
        tl.store(total + t * D + d, row, mask=inside)
        row = row.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row) / D + eps)
    tl.store(rstd + t, inverse)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y + t * y_t + d, (row * inverse * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _normalize(x, rstd, weight, y, D, x_t, y_t, offset, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    row = tl.load(x + t * x_t + d, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y + t * y_t + d, (row * tl.load(rstd + t) * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _add_update(rows, u, b, t, d, is_t, is_d, u_t, b_r, by, RANKS: tl.constexpr, HAS_SCALE: tl.constexpr):
    """Return rows + u b, the latter's columns times `by`, rank by rank."""
    for r in tl.static_range(RANKS):
        left = tl.load(u + t * u_t + r, mask=is_t, other=0.0).to(tl.float32)
        right = tl.load(b + r * b_r + d, mask=is_d, other=0.0).to(tl.float32)
        if HAS_SCALE:
            right *= by
        rows += left[:, None] * right[None, :]
    return rows


@triton.jit
def _forward_update(
    x, delta, weight, factor, shift, total, y, rstd, u, b, scale, u_t, b_r, T, D, delta_t, y_t, eps, offset,
    RANKS: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, BLOCK)
    is_t, is_d = t < T, d < D
    inside = is_t[:, None] & is_d[None, :]
    rows = tl.load(x + t[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    added = tl.load(delta + t[:, None] * delta_t + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        by = tl.load(factor + d, mask=is_d, other=0.0)
        rows += tl.load(shift + d, mask=is_d, other=0.0)[None, :]
        rows += (scale * by)[None, :] * added
        rows = _add_update(rows, u, b, t, d, is_t, is_d, u_t, b_r, by, RANKS, True)
    else:
        rows += scale * added
        rows = _add_update(rows, u, b, t, d, is_t, is_d, u_t, b_r, 1.0, RANKS, False)
    rows = rows.to(total.dtype.element_ty)
    tl.store(total + t[:, None] * D + d[None, :], rows, mask=inside)
    rows = rows.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(rows * rows, axis=1) / D + eps)
    tl.store(rstd + t, inverse, mask=is_t)
    w = tl.load(weight + d, mask=is_d, other=0.0).to(tl.float32) + offset
    tl.store(
        y + t[:, None] * y_t + d[None, :], (rows * inverse[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside
    )


@triton.jit
def _backward(
    dy, x, weight, rstd, out, D, dy_t, out_t, eps, offset,
    HAS_RSTD: tl.constexpr, HAS_ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    row = tl.load(x + t * D + d, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32) + offset
    g = tl.load(dy + t * dy_t + d, mask=inside, other=0.0).to(tl.float32) * w
    inverse = tl.load(rstd + t) if HAS_RSTD else tl.rsqrt(tl.sum(row * row) / D + eps)
    unit = row * inverse
    dx = inverse * (g - unit * (tl.sum(g * unit) / D))
    if HAS_ADD:
        dx += tl.load(out + t * out_t + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * out_t + d, dx.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_update(
    dy, x, weight, rstd, out, u, b, scale, u_t, b_r, T, D, dy_t, out_t, offset,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, BLOCK)
    is_t, is_d = t < T, d < D
    inside = is_t[:, None] & is_d[None, :]
    g = scale * tl.load(dy + t[:, None] * dy_t + d[None, :], mask=inside, other=0.0).to(tl.float32)
    unit = tl.load(x + t[:, None] * D + d[None, :], mask=inside, other=0.0)
    inverse = tl.load(rstd + t, mask=is_t, other=0.0)[:, None]
    g = _add_update(g, u, b, t, d, is_t, is_d, u_t, b_r, 1.0, RANKS, False)
    g *= (tl.load(weight + d, mask=is_d, other=0.0).to(tl.float32) + offset)[None, :]
    unit = unit.to(tl.float32) * inverse
    dx = inverse * (g - unit * (tl.sum(g * unit, axis=1) / D)[:, None])
    dx += tl.load(out + t[:, None] * out_t + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t[:, None] * out_t + d[None, :], dx.to(out.dtype.element_ty), mask=inside)
