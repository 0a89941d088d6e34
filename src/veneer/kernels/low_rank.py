"""Computes the adapters' own products: skinny matrices, whose cost is reading the activations, so each is read once.

Linear layers that share an input (q, k and v; gate and up) share these: their A matrices are stacked, their B matrices
form a block diagonal. `project` is x A^T (or dy B), `outer` is u^T x, the gradient of A (or of B). Dropout on the
adapter's input is part of them: its mask is a function of seed, token and column, computed in the kernel and never
stored. Each layer has its own mask, as in PEFT.

Sums over many tokens are split into a fixed number of parts that are added in a fixed order, so results are the same
bit for bit each time.

Shapes: T tokens, D width of the activation, R stacked ranks, padded to a multiple of 16; r rank of one linear; P parts.
"""

from typing import Any, NamedTuple

import torch

from veneer.kernels.launch import launch, power_of_2, runs_triton, tl, triton

PARTS = 264  # programs that fill a large GPU twice
# Largest number of ranks of a program, by its registers and shared memory; twice as many in `project`, which holds
# fewer tokens.
MAX_RANKS = 128
# Float32 has no tensor cores, and more stacked ranks take minutes to compile; cuBLAS computes those.
MAX_RANKS_FLOAT32 = 64


class Dropout(NamedTuple):
    """Dropout that zeroes an adapter's inputs with probability `p`.

    `seed` is an int64 tensor on the device with one element, so that a recorded graph can be replayed with another.
    `key` makes masks of layers that share a seed differ; the mask of stacked slot n has key + n.
    `skipped` is the number of tokens before the first row: a piece's mask is its part of the batch's mask.
    """

    p: float
    seed: torch.Tensor
    key: int
    skipped: int = 0


def project(
    x_TD: torch.Tensor,
    a_RD: torch.Tensor,
    out_TR: torch.Tensor,
    rank: int,
    dropout: Dropout | None = None,
    copy_TR: torch.Tensor | None = None,
) -> None:
    """Compute out = x a^T.

    Args:
        x_TD: activations, with any row stride.
        a_RD: stacked A matrices, with any strides.
        out_TR: output, with any row stride.
        rank: rank of one layer (with dropout: the slots' width).
        dropout: dropout on x, with a mask for each slot.
        copy_TR: second output, contiguous: the first columns of `out_TR`, as many as it has.
    """
    T, D = x_TD.shape
    R = len(a_RD)
    if not _is_compiled(x_TD, R):
        out_TR.copy_(_project_torch(x_TD, a_RD, rank, dropout))
        if copy_TR is not None:
            copy_TR.copy_(out_TR[:, : copy_TR.shape[1]])
        return
    rows = 64 if T >= 8192 else 32 if T >= 4096 else 16
    width = R if dropout is None else rank
    block_r, chunks = _chunks(width, 2 * MAX_RANKS)
    stages = 4 if block_r <= 64 and x_TD.dtype != torch.float32 else 2
    launch(_project, (triton.cdiv(T, rows), triton.cdiv(R, width) * chunks))(
        x_TD, a_RD, out_TR, out_TR if copy_TR is None else copy_TR, *(_dropout_arguments(dropout, x_TD)),
        T, D, R, width, 0 if copy_TR is None else copy_TR.shape[1],
        x_TD.stride(0), a_RD.stride(0), a_RD.stride(1), out_TR.stride(0),
        DROPOUT=dropout is not None, CHUNKS=chunks,
        BLOCK_T=rows, BLOCK_D=128 if block_r <= 64 else 64, BLOCK_R=block_r,
        PRECISION="ieee" if x_TD.dtype == torch.float32 else "tf32", num_warps=4, num_stages=stages,
    )  # fmt: skip


def outer(
    u_TR: torch.Tensor, x_TD: torch.Tensor, rank: int, dropout: Dropout | None = None, norm: Any = None
) -> torch.Tensor:
    """Return partial sums of u^T x, float32, shape (P, R, D).

    Args:
        u_TR: low-rank factor, with any row stride.
        x_TD: activations, with any row stride.
        rank: rank of one layer.
        dropout: dropout on x, with a mask for each slot.
        norm: none, or (rstd_T, weight_D, offset): x is first normalized, as `rms_norm` does.
    """
    T, D = x_TD.shape
    R = u_TR.shape[1]
    if not _is_compiled(x_TD, R):
        if norm is not None:
            rstd_T, weight_D, offset = norm
            x_TD = (x_TD.float() * rstd_T[:, None] * (weight_D.float() + offset)).to(x_TD.dtype)
        rows = [
            u_TR[:, start : start + rank].float().T @ _dropped(x_TD, dropout, start // rank).float()
            for start in range(0, R, rank)
        ]
        return torch.cat(rows)[None]
    block_d = 128
    width = R if dropout is None else rank
    block_r, chunks = _chunks(width, MAX_RANKS)
    blocks = triton.cdiv(R, width) * chunks
    tiles = triton.cdiv(D, block_d)
    parts = max(1, min(triton.cdiv(PARTS, tiles * blocks), triton.cdiv(T, 256)))
    span = triton.cdiv(triton.cdiv(T, parts), 64) * 64
    parts = triton.cdiv(T, span)
    out_PRD = torch.empty((parts, R, D), dtype=torch.float32, device=x_TD.device)
    rstd, weight, offset = norm if norm is not None else (x_TD, x_TD, 0.0)
    launch(_outer, (tiles, parts, blocks))(
        u_TR, x_TD, out_PRD, rstd, weight, offset, *(_dropout_arguments(dropout, x_TD)),
        T, D, R, width, span, u_TR.stride(0), x_TD.stride(0), DROPOUT=dropout is not None, HAS_NORM=norm is not None,
        CHUNKS=chunks, BLOCK_T=64, BLOCK_D=block_d, BLOCK_R=block_r,
        PRECISION="ieee" if x_TD.dtype == torch.float32 else "tf32", num_warps=4,
        num_stages=2 if x_TD.dtype == torch.float32 else 3,
    )  # fmt: skip
    return out_PRD


def add_projected(dx_TD: torch.Tensor, u_TR: torch.Tensor, a_RD: torch.Tensor, rank: int, dropout: Dropout) -> None:
    """Add the sum over slots of mask * (u a) / (1 - p) to dx in place; with dropout it is not in the large product."""
    T, D = dx_TD.shape
    R = len(a_RD)
    if not _is_compiled(dx_TD, R):
        total = dx_TD.float()
        for slot, start in enumerate(range(0, R, rank)):
            part = u_TR[:, start : start + rank].float() @ a_RD[start : start + rank].float()
            total += _dropped(part, dropout, slot)
        dx_TD.copy_(total)
        return
    block_r, chunks = _chunks(rank, MAX_RANKS)
    launch(_add_projected, (triton.cdiv(T, 64), triton.cdiv(D, 128)), (dx_TD,))(
        dx_TD, u_TR, a_RD, *_dropout_arguments(dropout, dx_TD), T, D, R, rank,
        dx_TD.stride(0), u_TR.stride(0), a_RD.stride(0), a_RD.stride(1),
        SLOTS=triton.cdiv(R, rank), CHUNKS=chunks, BLOCK_T=64, BLOCK_D=128, BLOCK_R=block_r,
        PRECISION="ieee" if dx_TD.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip


def _is_compiled(x: torch.Tensor, ranks: int) -> bool:
    """Return whether Triton computes this; else plain torch does."""
    return runs_triton(x) and not (x.is_cuda and x.dtype == torch.float32 and ranks > MAX_RANKS_FLOAT32)


def _chunks(ranks: int, most: int) -> tuple[int, int]:
    """Return the ranks of a program, and the number of chunks that all ranks need."""
    block = min(power_of_2(ranks), most)
    return block, triton.cdiv(ranks, block)


class Member(NamedTuple):
    """One linear layer of a group, in the group's stacked products.

    Attributes:
        start, end: columns among the group's outputs.
        first: first of its stacked ranks.
        rank: number of them; 0: it has no adapter.
        scale: factor of the adapter's output, as lora_alpha / r.
    """

    start: int
    end: int
    first: int = 0
    rank: int = 0
    scale: float = 1.0

    @property
    def ranks(self) -> slice:
        """Its stacked ranks."""
        return slice(self.first, self.first + self.rank)


def add_a(parts_PRD: torch.Tensor, grad_RD: torch.Tensor) -> None:
    """Add the sum of parts to `grad_RD`, the adapters' stacked A gradients in float32; parts may have more rows."""
    if not runs_triton(parts_PRD):
        grad_RD += parts_PRD.sum(0)[: len(grad_RD)]
        return
    size = grad_RD.numel()
    launch(_add_a, (triton.cdiv(size, 1024),), (grad_RD,))(
        parts_PRD, grad_RD, size, parts_PRD.stride(0), len(parts_PRD), BLOCK=1024
    )


def add_b(parts_PRN: torch.Tensor, grad: torch.Tensor, members: tuple[Member, ...]) -> None:
    """Add scale * each adapted layer's own block of the parts, transposed, to grad.

    Args:
        parts_PRN: result of `outer` over the group's outputs.
        grad: B gradients of the adapted layers, (outputs, rank) each, one after the other, float32.
        members: the group's layers.
    """
    if not runs_triton(parts_PRN):
        total_RN = parts_PRN.sum(0)
        at = 0
        for member in members:
            size = (member.end - member.start) * member.rank
            own_RN = total_RN[member.ranks, member.start : member.end] * member.scale
            grad[at : at + size] += own_RN.T.reshape(-1)
            at += size
        return
    none = Member(1 << 30, 1 << 30)
    first, second, third = (*members, none, none)[:3]
    P, R, N = parts_PRN.shape
    at_1 = (first.end - first.start) * first.rank
    at_2 = at_1 + (second.end - second.start) * second.rank
    launch(_add_b, (triton.cdiv(N, 64),), (grad,))(
        parts_PRN, grad, P, R, N, first.scale, second.scale, third.scale, at_1, at_2,
        BLOCK_R=power_of_2(max(member.rank for member in members)), BLOCK_N=64,
        START1=second.start, START2=third.start,
        FIRST0=first.first, FIRST1=second.first, FIRST2=third.first,
        RANK0=first.rank, RANK1=second.rank, RANK2=third.rank,
    )  # fmt: skip


def keep_mask(
    seed: int, key: int, shape: tuple[int, int], p: float, device: Any = None, skipped: int = 0
) -> torch.Tensor:
    """Return the elements that dropout keeps, as the kernels do: by a hash of seed, key and index."""
    T, D = shape
    mask32 = 0xFFFFFFFF
    row_T1 = torch.arange(skipped, skipped + T, device=device)[:, None]
    index = (row_T1 * D + torch.arange(D, device=device)[None]) & mask32
    mixed = index ^ _mix_int((seed + key * 0x9E3779B9) & mask32)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 0x846CA68B)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & mask32
    mixed = mixed ^ (mixed >> 16)
    return mixed >= int(p * 2**32)


def _mix_int(value: int) -> int:
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        value = ((value ^ (value >> shift)) * factor) & 0xFFFFFFFF
    return value ^ (value >> 15)


def _dropped(x_TD: torch.Tensor, dropout: Dropout | None, slot: int) -> torch.Tensor:
    if dropout is None:
        return x_TD
    shape, seed = (len(x_TD), x_TD.shape[1]), int(dropout.seed.item())
    keep_TD = keep_mask(seed, dropout.key + slot, shape, dropout.p, x_TD.device, dropout.skipped)
    return torch.where(keep_TD, x_TD.float() / (1 - dropout.p), 0.0).to(x_TD.dtype)


def _project_torch(x_TD: torch.Tensor, a_RD: torch.Tensor, rank: int, dropout: Dropout | None) -> torch.Tensor:
    if dropout is None:
        return x_TD @ a_RD.T
    slots = range(0, len(a_RD), rank)
    return torch.cat([_dropped(x_TD, dropout, n // rank) @ a_RD[n : n + rank].T for n in slots], dim=1)


def _dropout_arguments(dropout: Dropout | None, any_tensor: torch.Tensor) -> tuple[Any, ...]:
    if dropout is None:
        return any_tensor, 0, 0, 0, 1.0
    return dropout.seed, dropout.key, dropout.skipped, int(dropout.p * 2**32), 1 / (1 - dropout.p)


@triton.jit
def _keeps(seed, key, t, d, D, threshold):
    """See `keep_mask`; all in unsigned 32-bit arithmetic."""
    k = (tl.load(seed).to(tl.uint64) + key.to(tl.uint64) * 0x9E3779B9).to(tl.uint32)
    k = (k ^ (k >> 16)) * 0x21F0AAAD
    k = (k ^ (k >> 15)) * 0x735A2D97
    k = k ^ (k >> 15)
    m = (t[:, None].to(tl.uint32) * D.to(tl.uint32) + d[None, :].to(tl.uint32)) ^ k
    m = (m ^ (m >> 16)) * 0x21F0AAAD
    m = (m ^ (m >> 15)) * 0x735A2D97
    m = (m ^ (m >> 15)) * 0x846CA68B
    m = m ^ (m >> 16)
    return m.to(tl.int64) >= threshold


@triton.jit
def _project(
    x, a, out, copy, seed, key, skipped, threshold, kept_scale, T, D, R, WIDTH, copied, x_t, a_r, a_d, out_t,
    DROPOUT: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.program_id(1) // CHUNKS
    within = tl.program_id(1) % CHUNKS * BLOCK_R + tl.arange(0, BLOCK_R)
    r = slot * WIDTH + within
    is_r = (within < WIDTH) & (r < R)
    rows = t.to(tl.int64)[:, None] * x_t
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        tile = tl.load(x + rows + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        if DROPOUT:
            keep = _keeps(seed, key + slot, t + skipped, d, D, threshold)
            tile = tl.where(keep, tile.to(tl.float32) * kept_scale, 0.0).to(tile.dtype)
        b = tl.load(a + r[None, :] * a_r + d[:, None] * a_d, mask=is_r[None, :] & (d < D)[:, None], other=0.0)
        total = tl.dot(tile, b, total, input_precision=PRECISION)
    tl.store(
        out + t.to(tl.int64)[:, None] * out_t + r[None, :],
        total.to(out.dtype.element_ty),
        mask=(t < T)[:, None] & is_r[None, :],
    )
    if copied > 0:
        ptr = copy + t.to(tl.int64)[:, None] * copied + r[None, :]
        tl.store(ptr, total.to(out.dtype.element_ty), mask=(t < T)[:, None] & (is_r & (r < copied))[None, :])


@triton.jit
def _outer(
    u, x, out, rstd, weight, offset, seed, key, skipped, threshold, kept_scale, T, D, R, WIDTH, span, u_t, x_t,
    DROPOUT: tl.constexpr, HAS_NORM: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    part, slot = tl.program_id(1), tl.program_id(2) // CHUNKS
    within = tl.program_id(2) % CHUNKS * BLOCK_R + tl.arange(0, BLOCK_R)
    r = slot * WIDTH + within
    is_r = (within < WIDTH) & (r < R)
    total = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    if HAS_NORM:
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32) + offset
    first = part * span
    for start in range(first, tl.minimum(first + span, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        left = tl.load(u + t.to(tl.int64)[None, :] * u_t + r[:, None], mask=is_r[:, None] & (t < T)[None, :], other=0.0)
        tile = tl.load(
            x + t.to(tl.int64)[:, None] * x_t + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0
        )
        if HAS_NORM:
            inverse = tl.load(rstd + t, mask=t < T, other=0.0)
            tile = (tile.to(tl.float32) * inverse[:, None] * w[None, :]).to(tile.dtype)
        if DROPOUT:
            keep = _keeps(seed, key + slot, t + skipped, d, D, threshold)
            tile = tl.where(keep, tile.to(tl.float32) * kept_scale, 0.0).to(tile.dtype)
        total = tl.dot(left, tile, total, input_precision=PRECISION)
    index = (part.to(tl.int64) * R + r[:, None]) * D + d[None, :]
    tl.store(out + index, total, mask=is_r[:, None] & (d < D)[None, :])


@triton.jit
def _add_projected(
    dx, u, a, seed, key, skipped, threshold, kept_scale, T, D, R, WIDTH, dx_t, u_t, a_r, a_d,
    SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]
    ptr = dx + t.to(tl.int64)[:, None] * dx_t + d[None, :]
    total = tl.load(ptr, mask=inside, other=0.0).to(tl.float32)
    for block in tl.static_range(SLOTS * CHUNKS):
        slot = block // CHUNKS
        within = block % CHUNKS * BLOCK_R + tl.arange(0, BLOCK_R)
        r = slot * WIDTH + within
        is_r = (within < WIDTH) & (r < R)
        left = tl.load(u + t.to(tl.int64)[:, None] * u_t + r[None, :], mask=(t < T)[:, None] & is_r[None, :], other=0.0)
        right = tl.load(a + r[:, None] * a_r + d[None, :] * a_d, mask=is_r[:, None] & (d < D)[None, :], other=0.0)
        keep = _keeps(seed, key + slot, t + skipped, d, D, threshold)
        total += tl.where(keep, tl.dot(left, right, input_precision=PRECISION) * kept_scale, 0.0)
    tl.store(ptr, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _add_a(parts, grad, size, part_stride, P, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(parts + at, mask=inside, other=0.0)
    for part in range(1, P):
        total += tl.load(parts + part * part_stride + at, mask=inside, other=0.0)
    tl.store(grad + at, tl.load(grad + at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def _add_b(
    parts, grad, P, R, N, scale0, scale1, scale2, at1, at2, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    START1: tl.constexpr, START2: tl.constexpr, FIRST0: tl.constexpr, FIRST1: tl.constexpr, FIRST2: tl.constexpr,
    RANK0: tl.constexpr, RANK1: tl.constexpr, RANK2: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    is_2, is_1 = n >= START2, n >= START1
    first = tl.where(is_2, FIRST2, tl.where(is_1, FIRST1, FIRST0))
    rank = tl.where(is_2, RANK2, tl.where(is_1, RANK1, RANK0))
    scale = tl.where(is_2, scale2, tl.where(is_1, scale1, scale0))
    row = n - tl.where(is_2, START2, tl.where(is_1, START1, 0))
    before = tl.where(is_2, at2, tl.where(is_1, at1, 0))
    inside = (n < N)[:, None] & (r[None, :] < rank[:, None])
    index = (first[:, None] + r[None, :]).to(tl.int64) * N + n[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for part in range(P):
        total += tl.load(parts + part * R * N + index, mask=inside, other=0.0)
    at = grad + before[:, None] + row[:, None] * rank[:, None] + r[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total * scale[:, None], mask=inside)
