"""Scales the columns of a product, as DoRA does (arXiv 2402.09353): y = m / |W + s B A| * (W x + s B A x) + bias.

The norm of each row of W + s B A is a constant of the backward pass (section 4.3 of the paper). Its square is
|W|^2 + s B (2 A W^T + A A^T (s B)^T), row by row: W is read once for A W^T, and no sum of W and B A is ever made.

The product z = W x + s B A x is stored as it comes out, `OFF_GRID` times too large (see `update`), and whoever reads it
next scales and rounds it once: the norm, the gate or the rotation that follows. Backward turns the gradient of y into
that of z, and sums dy * z over the tokens, in a fixed order, for the gradient of m.

Shapes: T tokens, N outputs, R ranks, P parts.
"""

from typing import NamedTuple

import torch

from veneer.kernels.launch import launch, power_of_2, runs_triton, tl, triton
from veneer.kernels.update import OFF_GRID, Update, updated

MAX_RANKS = 128  # largest rank of a program; plain torch computes the norms of higher ones
PARTS = 528  # programs that fill a large GPU four times
LEAST = 1e-30  # square of a norm, so that a row of zeros gives zeros


class ColumnScale(NamedTuple):
    """What turns a stored product into an output: y = factor z + shift; float32.

    Attributes:
        factor_N: m / norm, divided by the factor that the product is stored with.
        shift_N: bias.
    """

    factor_N: torch.Tensor
    shift_N: torch.Tensor


def scaled(z_TN: torch.Tensor, scale: ColumnScale | None) -> torch.Tensor:
    """Return factor z + shift in float32; the plain torch twin of what kernels do as they read z."""
    return z_TN.float() if scale is None else z_TN.float() * scale.factor_N + scale.shift_N


def row_norms(
    norm_N: torch.Tensor,
    aw_RN: torch.Tensor,
    aa_RR: torch.Tensor,
    b_NR: torch.Tensor,
    magnitude_N: torch.Tensor,
    factor_N: torch.Tensor,
    inverse_N: torch.Tensor,
) -> None:
    """Compute m / norm and 1 / norm of the rows of W + s B A, both divided by `OFF_GRID`, into the last two arguments.

    Args:
        norm_N: norms of the rows of W, float32.
        aw_RN, aa_RR: A W^T and A A^T, with any row stride.
        b_NR: s B, with any row stride.
        magnitude_N: m, float32.
        factor_N, inverse_N: outputs, float32.
    """
    N, R = b_NR.shape
    if not runs_triton(factor_N) or R > MAX_RANKS:
        b = b_NR.float()
        change_N = (b * (2 * aw_RN.float().T + b @ aa_RR.float())).sum(1)
        inverse_N.copy_((norm_N.square() + change_N).clamp_min(LEAST).rsqrt() / OFF_GRID)
        factor_N.copy_(magnitude_N * inverse_N)
        return
    launch(_row_norms, (triton.cdiv(N, 64),))(
        norm_N, aw_RN, aa_RR, b_NR, magnitude_N, factor_N, inverse_N, N, R, 1 / OFF_GRID,
        aw_RN.stride(0), aa_RR.stride(0), b_NR.stride(0), LEAST=LEAST, BLOCK_N=64, BLOCK_R=power_of_2(R),
        PRECISION="ieee" if b_NR.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip


def scale_backward(
    dy_TN: torch.Tensor, z_TN: torch.Tensor, scale: ColumnScale, dz_TN: torch.Tensor, update: Update | None = None
) -> torch.Tensor:
    """Compute the gradient of the product, and the sums over tokens of dy z.

    Args:
        dy_TN: gradient of the output, with any row stride.
        z_TN: the product as it is stored, with any row stride.
        scale: its scale.
        dz_TN: gradient of the product, `OFF_GRID` not included; it may be `dy_TN`.
        update: update that was added to the stored product before it was scaled.

    Returns:
        Partial sums, float32, shape (P, N).
    """
    T, N = dy_TN.shape
    if not runs_triton(dy_TN):
        dy = dy_TN.float()
        sums_N = (dy * updated(z_TN, update)).sum(0)
        dz_TN.copy_(dy * (scale.factor_N * OFF_GRID))
        return sums_N[None]
    tiles = triton.cdiv(N, 128)
    parts = max(1, min(triton.cdiv(PARTS, tiles), triton.cdiv(T, 128)))
    span = triton.cdiv(triton.cdiv(T, parts), 32) * 32
    parts = triton.cdiv(T, span)
    sums_PN = torch.empty((parts, N), dtype=torch.float32, device=dy_TN.device)
    u_TR, b_RN, stored = update if update is not None else (dy_TN, dy_TN, 1.0)
    ranks = 0 if update is None else len(b_RN)
    launch(_scale_backward, (tiles, parts))(
        dy_TN, z_TN, scale.factor_N, dz_TN, sums_PN, u_TR, b_RN, stored, OFF_GRID, T, N, ranks, span,
        dy_TN.stride(0), z_TN.stride(0), dz_TN.stride(0), u_TR.stride(0), b_RN.stride(0),
        HAS_UPDATE=update is not None, BLOCK_T=32, BLOCK_N=128, BLOCK_R=power_of_2(max(1, ranks)),
        PRECISION="ieee" if dy_TN.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return sums_PN


@triton.jit
def _row_norms(
    norm, aw, aa, b, magnitude, factor, inverse, N, R, stored, aw_r, aa_r, b_n,
    LEAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    is_n, is_r = n < N, r < R
    inside = is_n[:, None] & is_r[None, :]
    left = tl.load(b + n.to(tl.int64)[:, None] * b_n + r[None, :], mask=inside, other=0.0)
    square = tl.load(aa + r[:, None] * aa_r + r[None, :], mask=is_r[:, None] & is_r[None, :], other=0.0)
    cross = tl.load(aw + r.to(tl.int64)[None, :] * aw_r + n[:, None], mask=inside, other=0.0).to(tl.float32)
    cross = 2.0 * cross + tl.dot(left, square, input_precision=PRECISION)
    own = tl.load(norm + n, mask=is_n, other=1.0)
    total = own * own + tl.sum(left.to(tl.float32) * cross, axis=1)
    found = stored / tl.sqrt(tl.maximum(total, LEAST))
    tl.store(inverse + n, found, mask=is_n)
    tl.store(factor + n, tl.load(magnitude + n, mask=is_n, other=0.0) * found, mask=is_n)


@triton.jit
def _scale_backward(
    dy, z, factor, dz, sums, u, b, stored, off_grid, T, N, R, span, dy_t, z_t, dz_t, u_t, b_r,
    HAS_UPDATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    is_n = n < N
    by = tl.load(factor + n, mask=is_n, other=0.0) * off_grid
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_UPDATE:
        r = tl.arange(0, BLOCK_R)
        right = tl.load(b + r[:, None] * b_r + n[None, :], mask=(r < R)[:, None] & is_n[None, :], other=0.0)
    last = tl.minimum((part + 1) * span, T)
    for start in range(part * span, last, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        is_t = t < last
        inside = is_t[:, None] & is_n[None, :]
        grad = tl.load(dy + t[:, None] * dy_t + n[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(z + t[:, None] * z_t + n[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_UPDATE:
            left = tl.load(u + t[:, None] * u_t + r[None, :], mask=is_t[:, None] & (r < R)[None, :], other=0.0)
            value = stored * value + tl.dot(left, right, input_precision=PRECISION)
        total += tl.sum(grad * value, axis=0)
        tl.store(dz + t[:, None] * dz_t + n[None, :], (grad * by[None, :]).to(dz.dtype.element_ty), mask=inside)
    tl.store(sums + part.to(tl.int64) * N + n, total, mask=is_n)
