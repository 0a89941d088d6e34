"""Linear layers that read one input, for a few rows, each with the low-rank delta of its own adapter: in one launch.

y = x W^T + s B A x, with the A and B of each row's adapter, of many that are stacked; number 0 has none. A step of
decoding is short: beside the products with the weights, launches of their own for A and B would cost more than what
they compute. So the first programs multiply x by the adapters' A matrices (D divided into parts, their sums float32).
The others each multiply x by a tile of W, which takes longer, and then add the parts, times B. Where tiles are few and
D is long, several programs share a tile (split-K); the last of them to end adds their sums, in one order.

A program that adds the parts waits until all are there. Those with parts wait for nothing, and GPUs have always begun
programs in their order, so they are running by then. What they count is zero again at the end, for the next launch; so
two launches with one count must not run at a time.

Shapes: T rows, T / B of each of B sequences; M layers, N adapters, R ranks, D inputs, F outputs of all layers.
"""

from collections.abc import Sequence
from functools import cache

import torch

from veneer.kernels.launch import launch, power_of_2, runs_triton, tl, triton
from veneer.kernels.own_adapter import (
    BITS,
    DIVISOR,
    MOST_LAYERS,
    MOST_RANKS,
    add_products,
    deltas_of,
    ends_of,
    split_outputs,
    which_layer,
)

MOST_ROWS = 64
PART = 1024  # inputs of a part, at least
MOST_PARTS = 8
COLUMNS = 64  # ranks, of several adapters, that a program multiplies by
TOGETHER = 64  # ranks, of several adapters, in one product with B
NARROWEST = 32  # outputs of a tile


def fits(weights: Sequence[torch.Tensor], ranks: int, dtype: torch.dtype | None = None) -> bool:
    """Return whether `own_linear` computes layers of these weights, with adapters of so many ranks.

    Args:
        weights: [outputs, D] of each layer.
        ranks: ranks of the adapters.
        dtype: dtype of the adapters; None: the weights'.
    """
    like = weights[0]
    dtype = dtype or like.dtype
    same = all((one.dtype, one.device, one.shape[1]) == (dtype, like.device, like.shape[1]) for one in weights)
    divides = like.shape[1] % DIVISOR == 0 and all(len(one) % DIVISOR == 0 for one in weights)
    lie_well = dtype.is_floating_point and all(one.is_contiguous() for one in weights)
    return len(weights) <= MOST_LAYERS and ranks <= MOST_RANKS and same and divides and lie_well


def own_linear(
    x_TD: torch.Tensor,
    weights: Sequence[torch.Tensor],
    a_NMRD: torch.Tensor,
    b_NRF: torch.Tensor,
    number_B: torch.Tensor,
    counts: torch.Tensor,
) -> list[torch.Tensor]:
    """Return the outputs of the layers, each [T, its outputs], contiguous.

    Args:
        x_TD: input of at most MOST_ROWS rows, with any row stride, of the weights' dtype.
        weights: [outputs, D] of each layer; they `fits` admits.
        a_NMRD: A matrices; contiguous.
        b_NRF: B matrices of all layers, one beside the other, with scales in them; contiguous.
        number_B: number of each sequence's adapter, int64.
        counts: from `new_counts`; zeros again when the outputs are there.
    """
    T, D = x_TD.shape
    assert 0 < T <= MOST_ROWS
    N, M, R, _ = a_NMRD.shape
    F = b_NRF.shape[2]
    tokens = T // len(number_B)
    widths = [len(one) for one in weights]
    if not runs_triton(x_TD):
        h_TMR = torch.einsum("tmrd,td->tmr", a_NMRD[number_B.repeat_interleave(tokens)].float(), x_TD.float())
        deltas = deltas_of(h_TMR.flatten(1)[None], b_NRF, widths, number_B)
        products = (x_TD.float() @ weight.float().T for weight in weights)
        return [(product + delta).to(x_TD.dtype) for product, delta in zip(products, deltas, strict=True)]
    block_t, block_r = min(MOST_ROWS, power_of_2(T)), power_of_2(R)
    parts, tiles_of_a = max(1, min(MOST_PARTS, D // PART)), M * triton.cdiv((N - 1) * R, COLUMNS)
    shape = _shape(x_TD, block_t, widths, tiles_of_a * parts)
    splits, programs = shape["SPLITS"], F // shape["BLOCK_F"] * shape["SPLITS"]
    part_span, split_span = (
        triton.cdiv(triton.cdiv(D, many), shape["BLOCK_D"]) * shape["BLOCK_D"] for many in (parts, splits)
    )
    parts = triton.cdiv(D, part_span)
    tasks = tiles_of_a * parts
    h_PTK = torch.empty((parts, T, M * R), dtype=torch.float32, device=x_TD.device)
    sums_STF = torch.empty((splits if splits > 1 else 0, T, F), dtype=torch.float32, device=x_TD.device)
    out = torch.empty(T * F, dtype=x_TD.dtype, device=x_TD.device)
    launch(_own_linear, (tasks + programs,))(
        x_TD, *(weights[min(member, M - 1)] for member in range(MOST_LAYERS)), a_NMRD, b_NRF, number_B, counts, h_PTK,
        sums_STF, out, T, tokens, D, F, N, R, part_span, split_span, tasks, *ends_of(widths), x_TD.stride(0),
        MEMBERS=M, PARTS=parts, BITS=BITS, BLOCK_T=block_t, BLOCK_C=COLUMNS, BLOCK_R=block_r,
        BLOCK_N=max(1, TOGETHER // block_r), PRECISION="ieee" if x_TD.dtype == torch.float32 else "tf32",
        num_stages=3, **shape,
    )  # fmt: skip
    return split_outputs(out, T, widths)


def new_counts(outputs: int, device: torch.device) -> torch.Tensor:
    """Return what `own_linear` counts with, of layers with so many outputs in all: zeros."""
    return torch.zeros(2 + outputs // NARROWEST, dtype=torch.int32, device=device)


def _shape(x_TD: torch.Tensor, block_t: int, widths: Sequence[int], tasks: int) -> dict[str, int]:
    """Return the shape of the programs that multiply by W, beside `tasks` others: what was fastest on an H100."""
    width, outputs, bytes_each = x_TD.shape[1], sum(widths), x_TD.element_size()
    processors, shared_bytes = _gpu(x_TD.device)
    splits = 1
    if bytes_each > 2:  # wider tiles of float32 do not fit registers
        block_f = NARROWEST
    elif outputs >= 192 * 128 and all(size % 128 == 0 for size in widths):
        block_f = 128
    elif outputs // 64 > 0.7 * processors:
        block_f = 64
    else:  # adding the sums of a split takes as long as some thousand inputs, the fewer the fewer rows
        splits = max(1, min(4, width // (4096 if block_t > 32 else 2048)))
        block_f = 64 if splits > 1 else NARROWEST
    at_once = min(3, triton.cdiv(tasks + outputs // block_f * splits, processors))  # programs of a processor
    column_bytes = (block_t + block_f) * bytes_each  # of inputs that are read at a time
    block_d = 64 if width % 128 or block_f == 128 or 256 * at_once * column_bytes > shared_bytes else 128
    stages = shared_bytes // (at_once * block_d * column_bytes)
    return {
        "BLOCK_F": block_f,
        "BLOCK_D": block_d,
        "SPLITS": splits,
        "STAGES": max(2, min(3 if block_f == 128 else 5, stages)),
        "num_warps": 8 if block_f == 128 or at_once == 1 else 4,
    }


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Return a GPU's multiprocessors, and the bytes that a program's pipeline can have."""
    if device.type != "cuda":
        return 1, 2**17  # Triton's interpreter, which runs one program after the other
    facts = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return facts["multiprocessor_count"], facts["max_shared_mem"] - 2**12


@triton.jit(do_not_specialize=["T", "tokens"])
def _own_linear(
    x, w0, w1, w2, a, b, number, counts, h, sums, out, T, tokens, D, F, N, R, part_span, split_span, tasks, end_0,
    end_1, x_t,
    MEMBERS: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    K = MEMBERS * R
    t = tl.arange(0, BLOCK_T)
    own = tl.load(number + t // tokens, mask=t < T, other=0).to(tl.int32)
    rows = x + tl.minimum(t, T - 1).to(tl.int64)[:, None] * x_t
    if program < tasks:  # columns c of A are the ranks of all adapters, those of an adapter side by side
        columns = (N - 1) * R
        tiles = tl.cdiv(columns, BLOCK_C)
        part = program % PARTS
        member = program // PARTS // tiles
        c = program // PARTS % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        n = 1 + c // R
        is_own = (own[:, None] == n[None, :]) & (c < columns)[None, :]
        is_read = tl.max(is_own.to(tl.int32), axis=0) > 0
        if tl.max(is_read.to(tl.int32), axis=0) > 0:
            ranks = a + ((n * MEMBERS + member) * R + c % R).to(tl.int64)[None, :] * D
            products = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
            for start in range(part * part_span, part * part_span + part_span, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                left = tl.load(rows + d[None, :], mask=(d < D)[None, :], other=0.0)
                right = tl.load(ranks + d[:, None], mask=is_read[None, :] & (d < D)[:, None], other=0.0)
                products = tl.dot(left, right, products, input_precision=PRECISION)
            at = h + (part * T + t).to(tl.int64)[:, None] * K + member * R + (c % R)[None, :]
            tl.store(at, products, mask=is_own)
        tl.debug_barrier()
        tl.atomic_add(counts, 1, sem="release")
    else:
        tile = (program - tasks) // SPLITS
        split = (program - tasks) % SPLITS
        first = tile * BLOCK_F
        member, begin, width = which_layer(first, end_0, end_1, F)
        weights = w0
        if member == 1:
            weights = w1
        if member == 2:
            weights = w2
        f = first + tl.arange(0, BLOCK_F)
        columns_of_w = tl.multiple_of(weights, 16) + (f - begin).to(tl.int64)[:, None] * D
        total = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
        offset = split * split_span
        for start in tl.range(offset, tl.minimum(D, offset + split_span), BLOCK_D, num_stages=STAGES):
            d = start + tl.arange(0, BLOCK_D)
            left = tl.load(rows + d[None, :])
            right = tl.load(columns_of_w + d[None, :], eviction_policy="evict_first")
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)

        is_row = (t < T)[:, None]
        is_last = True
        if SPLITS > 1:
            of_others = sums + t.to(tl.int64)[:, None] * F + f[None, :]
            tl.store(of_others + split * T.to(tl.int64) * F, total, mask=is_row)
            tl.debug_barrier()
            is_last = tl.atomic_add(counts + 2 + tile, 1, sem="acq_rel") == SPLITS - 1
            tl.debug_barrier()
        if is_last:
            if SPLITS > 1:
                total = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
                for one in tl.static_range(SPLITS):
                    total += tl.load(of_others + one * T.to(tl.int64) * F, mask=is_row, other=0.0, cache_modifier=".cg")
                tl.atomic_xchg(counts + 2 + tile, 0)
            seen = tl.atomic_add(counts, 0, sem="acquire")
            while seen < tasks:
                seen = tl.atomic_add(counts, 0, sem="acquire")
            tl.debug_barrier()
            total = add_products(
                total, h, b, own, t, f, member * R, T, F, N, R, K, F, PARTS, 1, BITS, BLOCK_T, BLOCK_R, BLOCK_N,
                PRECISION,
            )  # fmt: skip
            at = out + T * begin.to(tl.int64) + t.to(tl.int64)[:, None] * width + (f - begin)[None, :]
            tl.store(at, total.to(out.dtype.element_ty), mask=is_row)
            finished = tl.atomic_add(counts + 1, 1, sem="relaxed")
            if finished == F // BLOCK_F - 1:  # the next launch begins with zeros
                tl.atomic_xchg(counts, 0)
                tl.atomic_xchg(counts + 1, 0)
