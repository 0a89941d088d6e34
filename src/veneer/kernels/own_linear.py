"""Linear layers that read one input, for a few rows, each with the low-rank delta of its own adapter: in one launch.

y = x W^T + s B A x, with the A and B of each row's adapter, of many that are stacked; number 0 has none. A step of
decoding is short: beside the products with the weights, launches of their own for A and B would cost more than what
they compute. So the first programs multiply x by the adapters' A matrices (D divided into parts, their sums float32).
The others each multiply x by its columns of W, which takes longer, and then add the parts, times B.

A program with columns of W waits until all parts are there. Those with parts wait for nothing, and GPUs have always
begun programs in their order, so they are running by then. What they count is zero again at the end, for the next
launch; so two launches with one count must not run at a time.

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
PART = 1024  # inputs of a part
COLUMNS = 64  # ranks, of several adapters, that a program multiplies by
TOGETHER = 64  # ranks, of several adapters, in one product with B


def fits(weights: Sequence[torch.Tensor], ranks: int, dtype: torch.dtype | None = None) -> bool:
    """Return whether `own_linear` computes layers of these weights, with adapters of so many ranks.

    Args:
        weights: [outputs, D] of each layer.
        ranks: ranks of the adapters.
        dtype: of the adapters; without it, it is the weights'.
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
        counts: two zeros, int32, which are zeros again when the outputs are there.
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
    # Programs with more columns read x less often, if there are enough of them; float32 does not fit their registers.
    are_wide = x_TD.element_size() == 2 and F >= 192 * 128 and all(width % 128 == 0 for width in widths)
    block_f = 128 if are_wide else 32
    processors, shared_bytes = _gpu(x_TD.device)
    warps = 4 if block_f == 32 and F // block_f > processors else 8
    column_bytes = (block_t + block_f) * x_TD.element_size()  # of inputs that are read at a time
    block_d = 128 if D % 128 == 0 and 256 * column_bytes <= shared_bytes else 64
    stages = shared_bytes // (block_d * column_bytes)
    parts = max(1, D // PART)
    span = triton.cdiv(triton.cdiv(D, parts), block_d) * block_d
    parts = triton.cdiv(D, span)
    tasks = M * triton.cdiv((N - 1) * R, COLUMNS) * parts
    h_PTK = torch.empty((parts, T, M * R), dtype=torch.float32, device=x_TD.device)
    out = torch.empty(T * F, dtype=x_TD.dtype, device=x_TD.device)
    launch(_own_linear, (tasks + F // block_f,), weights)(
        x_TD, *(weights[min(member, M - 1)] for member in range(MOST_LAYERS)), a_NMRD, b_NRF, number_B, counts, h_PTK,
        out, T, tokens, D, F, N, R, span, tasks, *ends_of(widths), x_TD.stride(0),
        MEMBERS=M, PARTS=parts, BITS=BITS, BLOCK_T=block_t, BLOCK_F=block_f, BLOCK_D=block_d, BLOCK_C=COLUMNS,
        BLOCK_R=block_r, BLOCK_N=max(1, TOGETHER // block_r),
        PRECISION="ieee" if x_TD.dtype == torch.float32 else "tf32",
        STAGES=max(2, min(3 if block_f == 128 else 4, stages)), num_warps=warps, num_stages=3,
    )  # fmt: skip
    return split_outputs(out, T, widths)


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Return a GPU's multiprocessors, and the bytes that a program's pipeline can have."""
    if device.type != "cuda":
        return 1, 2**17  # Triton's interpreter, which runs one program after the other
    facts = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return facts["multiprocessor_count"], facts["max_shared_mem"] - 2**12


@triton.jit(do_not_specialize=["T", "tokens"])
def _own_linear(
    x, w0, w1, w2, a, b, number, counts, h, out, T, tokens, D, F, N, R, span, tasks, end_0, end_1, x_t,
    MEMBERS: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
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
            for start in range(part * span, part * span + span, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                left = tl.load(rows + d[None, :], mask=(d < D)[None, :], other=0.0)
                right = tl.load(ranks + d[:, None], mask=is_read[None, :] & (d < D)[:, None], other=0.0)
                products = tl.dot(left, right, products, input_precision=PRECISION)
            at = h + (part * T + t).to(tl.int64)[:, None] * K + member * R + (c % R)[None, :]
            tl.store(at, products, mask=is_own)
        tl.debug_barrier()
        tl.atomic_add(counts, 1, sem="release")
    else:
        first = (program - tasks) * BLOCK_F
        member, begin, width = which_layer(first, end_0, end_1, F)
        weights = w0
        if member == 1:
            weights = w1
        if member == 2:
            weights = w2
        f = first + tl.arange(0, BLOCK_F)
        columns_of_w = tl.multiple_of(weights, 16) + (f - begin).to(tl.int64)[:, None] * D
        total = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            d = start + tl.arange(0, BLOCK_D)
            left = tl.load(rows + d[None, :])
            right = tl.load(columns_of_w + d[None, :], eviction_policy="evict_first")
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)

        seen = tl.atomic_add(counts, 0, sem="acquire")
        while seen < tasks:
            seen = tl.atomic_add(counts, 0, sem="acquire")
        tl.debug_barrier()
        total = add_products(
            total, h, b, own, t, f, member * R, T, F, N, R, K, F, PARTS, 1, BITS, BLOCK_T, BLOCK_R, BLOCK_N, PRECISION
        )
        at = out + T * begin.to(tl.int64) + t.to(tl.int64)[:, None] * width + (f - begin)[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=(t < T)[:, None])
        finished = tl.atomic_add(counts + 1, 1, sem="relaxed")
        if finished == tl.num_programs(0) - tasks - 1:  # the next launch begins with zeros
            tl.atomic_xchg(counts, 0)
            tl.atomic_xchg(counts + 1, 0)
