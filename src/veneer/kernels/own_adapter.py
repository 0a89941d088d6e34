"""Low-rank deltas of each row's own adapter, of many that are stacked; number 0 has none.

`project_own` is x A^T with the matrix of each row's adapter, for linear layers that read one input (q, k and v; gate
and up) in one launch. `own_deltas` is its product with B for all of these layers, to which the products with their
weights can be added; `add_own` adds it to one layer's output in place. Programs find out on the device which adapters
their rows have, and read the matrices of those alone; so the launches are the same for any mix of adapters, and a mix
costs what its adapters' matrices cost to read.

The width of the input is divided among P programs, since a few rows with a few ranks would occupy only a few; those
that multiply by B add their sums, in float32 and in one order.

Shapes: T rows, T / B of each of B sequences; M layers of a group, N adapters, R ranks, D inputs, F outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch

from veneer.kernels.launch import launch, power_of_2, runs_triton, tl, triton

# Inputs of a part, at least, by the most rows that are divided so: few numbers, since each is compiled.
PARTS = ((64, 512), (2048, 1024))
MOST_PARTS = 16
MOST_LAYERS = 3  # whose deltas are computed at once
DIVISOR = 64  # of their outputs
MOST_RANKS = 64  # ranks of a program
TOGETHER = 128  # ranks of several adapters in one product
BITS = 62  # adapters that are told apart where matrices are skipped; the last stands for all further ones


def project_own(x_TD: torch.Tensor, a_NMRD: torch.Tensor, number_B: torch.Tensor) -> torch.Tensor:
    """Return partial sums of each row's product with its adapter's matrices, float32, [P, T, M * R].

    What is returned for rows without an adapter is undefined.

    Args:
        x_TD: input, with any row stride.
        a_NMRD: A matrices; contiguous.
        number_B: number of each sequence's adapter, int64.
    """
    T, D = x_TD.shape
    N, M, R, _ = a_NMRD.shape
    tokens = T // len(number_B)
    if not runs_triton(x_TD):
        own_TMRD = a_NMRD[number_B.repeat_interleave(tokens)]
        return torch.einsum("tmrd,td->tmr", own_TMRD.float(), x_TD.float()).flatten(1)[None]
    block_t, (block_r, chunks) = _rows(T), _chunks(R)
    is_wide = x_TD.dtype == torch.float32
    block_d = 64 if is_wide else 128
    part = next((inputs for rows, inputs in PARTS if rows >= T), D)
    span = triton.cdiv(triton.cdiv(D, max(1, min(MOST_PARTS, D // part))), block_d) * block_d
    parts = triton.cdiv(D, span)
    out_PTK = torch.empty((parts, T, M * R), dtype=torch.float32, device=x_TD.device)
    launch(_project_own, (triton.cdiv(T, block_t), max(1, (N - 1) * M * chunks), parts))(
        x_TD, a_NMRD, number_B, out_PTK, T, tokens, D, R, M * R, span, x_TD.stride(0),
        MEMBERS=M, CHUNKS=chunks, BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_R=block_r,
        PRECISION="ieee" if is_wide else "tf32", num_warps=4, num_stages=3 if block_r <= 32 else 2,
    )  # fmt: skip
    return out_PTK


def add_own(
    out_TF: torch.Tensor, h_PTK: torch.Tensor, member: int, b_NRF: torch.Tensor, number_B: torch.Tensor
) -> None:
    """Add each row's product with its adapter's B matrix to `out_TF`, in place.

    Args:
        out_TF: output of a layer, with any row stride.
        h_PTK: result of `project_own`, for the layer's group; it is rounded to the matrices' dtype.
        member: the layer among the group's.
        b_NRF: B matrices, with scales in them; their rows, of all adapters, at one distance.
        number_B: number of each sequence's adapter, int64.
    """
    T, F = out_TF.shape
    N, R, _ = b_NRF.shape
    if not runs_triton(out_TF):
        (delta_TF,) = deltas_of(h_PTK[:, :, member * R : (member + 1) * R], b_NRF, [F], number_B)
        out_TF.copy_(out_TF.float() + delta_TF)
        return
    blocks = triton.cdiv(T, _rows(T))
    block_f = next((size for size in (128, 64) if triton.cdiv(F, size) * blocks >= 64), 32)
    launch(_add_own, (triton.cdiv(F, block_f), blocks), (out_TF,))(
        out_TF, h_PTK, b_NRF, number_B, T, T // len(number_B), F, N, R, h_PTK.shape[2], member * R,
        out_TF.stride(0), b_NRF.stride(1), BLOCK_F=block_f, **_constants(h_PTK, b_NRF, number_B),
    )  # fmt: skip


def own_deltas(
    h_PTK: torch.Tensor, b_NRF: torch.Tensor, widths: Sequence[int], number_B: torch.Tensor
) -> list[torch.Tensor]:
    """Return each row's products with its adapter's B matrices of layers that read one input, each [T, its outputs].

    Args:
        h_PTK: result of `project_own`; it is rounded to the matrices' dtype.
        b_NRF: B matrices of all layers, one beside the other, with scales in them; contiguous.
        widths: outputs of each layer, multiples of DIVISOR; at most MOST_LAYERS.
        number_B: number of each sequence's adapter, int64.
    """
    T = h_PTK.shape[1]
    N, R, F = b_NRF.shape
    if not runs_triton(h_PTK):
        return [delta.to(b_NRF.dtype) for delta in deltas_of(h_PTK, b_NRF, widths, number_B)]
    out = torch.empty(T * F, dtype=b_NRF.dtype, device=b_NRF.device)
    block_f = 128 if all(width % 128 == 0 for width in widths) else DIVISOR
    launch(_own_deltas, (F // block_f, triton.cdiv(T, _rows(T))))(
        out, h_PTK, b_NRF, number_B, T, T // len(number_B), F, N, R, *ends_of(widths),
        MEMBERS=len(widths), BLOCK_F=block_f, **_constants(h_PTK, b_NRF, number_B),
    )  # fmt: skip
    return split_outputs(out, T, widths)


def deltas_of(
    h_PTK: torch.Tensor, b_NRF: torch.Tensor, widths: Sequence[int], number_B: torch.Tensor
) -> list[torch.Tensor]:
    """Return what `own_deltas` does, by torch, in float32."""
    number_T = number_B.repeat_interleave(h_PTK.shape[1] // len(number_B))
    h_TMR = h_PTK.sum(0).unflatten(1, (len(widths), -1)).to(b_NRF.dtype).float()
    h_TMR = torch.where(number_T[:, None, None] > 0, h_TMR, torch.zeros_like(h_TMR))
    b_of_each = b_NRF.split(list(widths), 2)
    return [torch.einsum("tr,trf->tf", h_TMR[:, m], b[number_T].float()) for m, b in enumerate(b_of_each)]


def ends_of(widths: Sequence[int]) -> list[int]:
    """Return the numbers of outputs of the first layer, and of the first two; all of them where there are no more."""
    return [sum(widths[:count]) for count in range(1, MOST_LAYERS)]


def split_outputs(out: torch.Tensor, rows: int, widths: Sequence[int]) -> list[torch.Tensor]:
    """Return the outputs of layers that lie one after the other, each [rows, its outputs]."""
    parts = out.split([rows * width for width in widths])
    return [part.view(rows, width) for part, width in zip(parts, widths, strict=True)]


def _constants(h_PTK: torch.Tensor, b_NRF: torch.Tensor, number_B: torch.Tensor) -> dict[str, Any]:
    T = h_PTK.shape[1]
    block_r, chunks = _chunks(b_NRF.shape[1])
    is_alone = T // len(number_B) % _rows(T) == 0  # the rows of a program all have one adapter
    return {
        "PARTS": len(h_PTK),
        "CHUNKS": chunks,
        "BITS": BITS,
        "BLOCK_T": _rows(T),
        "BLOCK_R": block_r,
        "BLOCK_N": 1 if is_alone else TOGETHER // block_r,
        "PRECISION": "ieee" if b_NRF.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 2,
    }


def _rows(rows: int) -> int:
    return min(64, power_of_2(rows))


def _chunks(ranks: int) -> tuple[int, int]:
    """Return the ranks of a program, and the number of chunks that all ranks need."""
    block = min(power_of_2(ranks), MOST_RANKS)
    return block, triton.cdiv(ranks, block)


@triton.jit(do_not_specialize=["T", "tokens"])
def _project_own(
    x, a, number, out, T, tokens, D, R, K, span, x_t,
    MEMBERS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = 1 + tl.program_id(1) // (MEMBERS * CHUNKS)
    member = tl.program_id(1) // CHUNKS % MEMBERS
    r = tl.program_id(1) % CHUNKS * BLOCK_R + tl.arange(0, BLOCK_R)
    is_own = tl.load(number + t // tokens, mask=t < T, other=0) == n
    if tl.max(is_own.to(tl.int32), axis=0) > 0:
        is_r = r < R
        rows = t.to(tl.int64)[:, None] * x_t
        ranks = a + ((n * MEMBERS + member) * R + r).to(tl.int64)[None, :] * D
        first = tl.program_id(2) * span
        total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for start in range(first, first + span, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            tile = tl.load(x + rows + d[None, :], mask=is_own[:, None] & (d < D)[None, :], other=0.0)
            right = tl.load(ranks + d[:, None], mask=is_r[None, :] & (d < D)[:, None], other=0.0)
            total = tl.dot(tile, right, total, input_precision=PRECISION)
        row = (tl.program_id(2).to(tl.int64) * T + t)[:, None] * K
        tl.store(out + row + member * R + r[None, :], total, mask=is_own[:, None] & is_r[None, :])


@triton.jit
def _either(one, other):
    return one | other


@triton.jit
def which_layer(column, end_0, end_1, F):
    """Return which of the layers beside each other has a column, the first column of that layer, and its width."""
    member = (column >= end_0).to(tl.int32) + (column >= end_1).to(tl.int32)
    begin = tl.where(column >= end_1, end_1, tl.where(column >= end_0, end_0, 0))
    end = tl.where(column >= end_1, F, tl.where(column >= end_0, end_1, end_0))
    return member, begin, end - begin


@triton.jit
def add_products(
    total, h, b, own, t, f, first, T, F, N, R, K, b_r,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `total`, of rows t and columns f, and their products with B: of the ranks from `first` on in h."""
    one = tl.full((BLOCK_T,), 1, dtype=tl.int64)
    occurring = tl.reduce(one << tl.minimum(own, BITS), 0, _either)
    lowest, highest = tl.min(tl.where(own > 0, own, N), axis=0), tl.max(own, axis=0)
    for chunk in tl.static_range(CHUNKS):
        r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
        is_r = r < R
        at = h + t.to(tl.int64)[:, None] * K + first + r[None, :]
        left = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            is_there = (own > 0)[:, None] & is_r[None, :]
            left += tl.load(at + part * T * K, mask=is_there, other=0.0, cache_modifier=".cg")  # as others wrote it
        left = left.to(b.dtype.element_ty)
        for start in range(lowest, highest + 1, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            is_read = (n < N) & ((occurring >> tl.minimum(n, BITS)) & 1 > 0)
            if tl.max(is_read.to(tl.int32), axis=0) > 0:
                is_mine = (own[:, None] == n[None, :])[:, :, None]
                mine = tl.where(is_mine, left[:, None, :], tl.zeros_like(left)[:, None, :])
                mine = tl.reshape(mine, (BLOCK_T, BLOCK_N * BLOCK_R))
                row = tl.reshape(n[:, None] * R + r[None, :], (BLOCK_N * BLOCK_R,))
                is_row = tl.reshape(is_read[:, None] & is_r[None, :], (BLOCK_N * BLOCK_R,))
                right = tl.load(
                    b + row.to(tl.int64)[:, None] * b_r + f[None, :], mask=is_row[:, None] & (f < F)[None, :], other=0.0
                )
                total = tl.dot(mine, right, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "tokens"])
def _add_own(
    out, h, b, number, T, tokens, F, N, R, K, first, out_t, b_r,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    own = tl.load(number + t // tokens, mask=t < T, other=0).to(tl.int32)
    inside = (own > 0)[:, None] & (f < F)[None, :]  # which no row beyond T is
    ptr = out + t.to(tl.int64)[:, None] * out_t + f[None, :]
    total = tl.load(ptr, mask=inside, other=0.0).to(tl.float32)
    total = add_products(
        total, h, b, own, t, f, first, T, F, N, R, K, b_r, PARTS, CHUNKS, BITS, BLOCK_T, BLOCK_R, BLOCK_N, PRECISION
    )
    tl.store(ptr, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "tokens"])
def _own_deltas(
    out, h, b, number, T, tokens, F, N, R, end_0, end_1,
    MEMBERS: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_F
    member, begin, width = which_layer(column, end_0, end_1, F)
    f = column + tl.arange(0, BLOCK_F)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    own = tl.load(number + t // tokens, mask=t < T, other=0).to(tl.int32)
    total = add_products(
        tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32), h, b, own, t, f, member * R, T, F, N, R, MEMBERS * R, F,
        PARTS, CHUNKS, BITS, BLOCK_T, BLOCK_R, BLOCK_N, PRECISION,
    )  # fmt: skip
    at = out + T * begin.to(tl.int64) + t.to(tl.int64)[:, None] * width + (f - begin)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(t < T)[:, None])
