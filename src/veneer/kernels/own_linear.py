"""Linear layers that read one input, for a few rows, each with the low-rank delta of its own adapter: in one launch.

y = x W^T + s B A x, with the A and B of each row's adapter, of many that are stacked; number 0 has none. A step of
decoding is short: beside the products with the weights, launches of their own for A and B would cost more than what
they compute. So the first programs multiply x by the adapters' A matrices (D divided into parts, their sums float32);
then each multiplies x by its columns of W, which takes longer, and adds the parts, times B, when all have been written.

A program waits for the first PROJECTING ones, which do their parts before they wait themselves. These are no more than
the GPU has multiprocessors, and GPUs have always begun programs in their order, so all of them are running by then.
What they count is zero again at the end, for the next launch; so two launches with one count must not run at a time.

Shapes: T rows, T / B of each of B sequences; M layers, N adapters, R ranks, D inputs, F outputs of all layers.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from veneer.kernels.launch import launch, power_of_2, runs_triton, tl, triton
from veneer.kernels.own_adapter import BITS, either

MOST_ROWS = 64
MOST_RANKS = 64
DIVISOR = 64  # of inputs, and of each layer's outputs
PART = 256  # inputs of a part, at least
TOGETHER = 64  # ranks of several adapters in one product


class Weights(NamedTuple):
    """Weights of layers that read one input, and where kernels find them.

    Attributes:
        weights: [outputs, D] of each layer, contiguous.
        address_M: Their addresses, int64.
        first: Columns before each layer's among all outputs, int32, [M + 1].
        counts: Two zeros, int32.
    """

    weights: tuple[torch.Tensor, ...]
    address_M: torch.Tensor
    first: torch.Tensor
    counts: torch.Tensor


def weights_of(layers: Sequence[torch.Tensor]) -> Weights | None:
    """Return what `own_linear` needs of layers' weights; None: they are not for it."""
    like = layers[0]
    same = all((one.dtype, one.device, one.shape[1]) == (like.dtype, like.device, like.shape[1]) for one in layers)
    divides = like.shape[1] % DIVISOR == 0 and all(len(one) % DIVISOR == 0 for one in layers)
    if not (same and divides and like.is_floating_point() and all(one.is_contiguous() for one in layers)):
        return None
    ends = torch.tensor([len(one) for one in layers]).cumsum(0).tolist()
    return Weights(
        tuple(layers),
        torch.tensor([one.data_ptr() for one in layers], device=like.device),
        torch.tensor([0, *ends], dtype=torch.int32, device=like.device),
        torch.zeros(2, dtype=torch.int32, device=like.device),
    )


def own_linear(
    x_TD: torch.Tensor, layers: Weights, a_NMRD: torch.Tensor, b_NRF: torch.Tensor, number_B: torch.Tensor
) -> list[torch.Tensor]:
    """Return the outputs of the layers, each [T, its outputs], contiguous.

    Args:
        x_TD: input of at most MOST_ROWS rows, with any row stride, of the weights' dtype.
        layers: weights.
        a_NMRD: A matrices of at most MOST_RANKS ranks; contiguous.
        b_NRF: B matrices of all layers, one beside the other, with scales in them; contiguous.
        number_B: number of each sequence's adapter, int64.
    """
    T, D = x_TD.shape
    assert 0 < T <= MOST_ROWS
    N, M, R, _ = a_NMRD.shape
    F = b_NRF.shape[2]
    tokens = T // len(number_B)
    widths = [len(one) for one in layers.weights]
    if not runs_triton(x_TD):
        number_T = number_B.repeat_interleave(tokens)
        h_TMR = torch.einsum("tmrd,td->tmr", a_NMRD[number_T].float(), x_TD.float()).to(b_NRF.dtype).float()
        outputs = []
        for member, (weight, b_NRO) in enumerate(zip(layers.weights, b_NRF.split(widths, 2), strict=True)):
            delta_TO = torch.einsum("tr,tro->to", h_TMR[:, member], b_NRO[number_T].float())
            own_TO = torch.where(number_T[:, None] > 0, delta_TO, torch.zeros_like(delta_TO))
            outputs.append((x_TD.float() @ weight.float().T + own_TO).to(x_TD.dtype))
        return outputs
    block_t, block_r = min(MOST_ROWS, power_of_2(T)), power_of_2(R)
    # Programs with more columns read x less often, if there are enough of them; float32 does not fit their registers.
    are_wide = x_TD.element_size() == 2 and F >= 192 * 128 and all(width % 128 == 0 for width in widths)
    block_f = 128 if are_wide else 32
    programs = F // block_f
    processors, shared_bytes = _gpu(x_TD.device)
    warps = 4 if block_f == 32 and programs > processors else 8
    column_bytes = (block_t + block_f) * x_TD.element_size()  # of inputs that are read at a time
    block_d = 128 if D % 128 == 0 and 256 * column_bytes <= shared_bytes else 64
    wanted = 3 if block_f == 128 else 4 if warps == 4 else 6
    parts = max(1, min(4 if block_f == 128 else 32, D // PART))
    span = triton.cdiv(triton.cdiv(D, parts), block_d) * block_d
    parts = triton.cdiv(D, span)
    h_PTK = torch.empty((parts, T, M * R), dtype=torch.float32, device=x_TD.device)
    out = torch.empty(T * F, dtype=x_TD.dtype, device=x_TD.device)
    launch(_own_linear, (programs,), layers.weights)(
        x_TD, a_NMRD, b_NRF, number_B, layers.address_M, layers.first, layers.counts, h_PTK, out,
        T, tokens, D, F, N, R, span, x_TD.stride(0),
        MEMBERS=M, MEMBERS_2=1 << (M - 1).bit_length(), PARTS=parts, PROJECTING=min(programs, processors), BITS=BITS,
        BLOCK_T=block_t, BLOCK_F=block_f, BLOCK_D=block_d, BLOCK_C=64 if M > 2 else 32, BLOCK_R=block_r,
        BLOCK_N=max(1, TOGETHER // block_r), PRECISION="ieee" if x_TD.dtype == torch.float32 else "tf32",
        STAGES=max(2, min(wanted, shared_bytes // (block_d * column_bytes))), num_warps=warps, num_stages=3,
    )  # fmt: skip
    return [part.view(T, width) for part, width in zip(out.split([T * width for width in widths]), widths, strict=True)]


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Return a GPU's multiprocessors, and the bytes that a program's pipeline can have."""
    if device.type != "cuda":
        return 1, 2**17  # Triton's interpreter, which runs one program after the other
    facts = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return facts["multiprocessor_count"], facts["max_shared_mem"] - 2**12


@triton.jit
def _project(
    task, rows, a, own, h, T, D, N, R, span,
    MEMBERS: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a part of the products with A; columns c are the ranks of all adapters, one adapter after the other."""
    columns = (N - 1) * R
    part = task % PARTS
    tiles = tl.cdiv(columns, BLOCK_C)
    member = task // PARTS // tiles
    t = tl.arange(0, BLOCK_T)
    c = task // PARTS % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
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
        at = h + (part * T + t).to(tl.int64)[:, None] * (MEMBERS * R) + member * R + (c % R)[None, :]
        tl.store(at, products, mask=is_own)


@triton.jit(do_not_specialize=["T", "tokens"])
def _own_linear(
    x, a, b, number, address, first, counts, h, out, T, tokens, D, F, N, R, span, x_t,
    MEMBERS: tl.constexpr, MEMBERS_2: tl.constexpr, PARTS: tl.constexpr, PROJECTING: tl.constexpr, BITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    K = MEMBERS * R
    t = tl.arange(0, BLOCK_T)
    own = tl.load(number + t // tokens, mask=t < T, other=0).to(tl.int32)
    rows = x + tl.minimum(t, T - 1).to(tl.int64)[:, None] * x_t

    tasks = MEMBERS * tl.cdiv((N - 1) * R, BLOCK_C) * PARTS
    if program < PROJECTING:
        for task in range(program, tasks, PROJECTING):
            _project(task, rows, a, own, h, T, D, N, R, span, MEMBERS, PARTS, BLOCK_T, BLOCK_D, BLOCK_C, PRECISION)
            tl.debug_barrier()
            tl.atomic_add(counts, 1, sem="release")

    # Products with the columns of W.
    f = program * BLOCK_F + tl.arange(0, BLOCK_F)
    m = tl.arange(0, MEMBERS_2)
    ends = tl.load(first + 1 + m, mask=m < MEMBERS, other=2147483647)
    member = tl.sum((ends <= program * BLOCK_F).to(tl.int32), axis=0)
    begin = tl.multiple_of(tl.load(first + member), 16)
    width = tl.multiple_of(tl.load(first + member + 1) - begin, 16)
    weights = tl.multiple_of(tl.load(address + member).to(tl.pointer_type(x.dtype.element_ty)), 16)
    weights += (f - begin).to(tl.int64)[:, None] * D
    total = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        left = tl.load(rows + d[None, :])
        right = tl.load(weights + d[None, :], eviction_policy="evict_first")
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)

    seen = tl.atomic_add(counts, 0, sem="acquire")
    while seen < tasks:
        seen = tl.atomic_add(counts, 0, sem="acquire")
    tl.debug_barrier()
    r = tl.arange(0, BLOCK_R)
    is_r = r < R
    at = h + t.to(tl.int64)[:, None] * K + member * R + r[None, :]
    left = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        is_there = (own > 0)[:, None] & is_r[None, :]
        left += tl.load(at + part * T * K, mask=is_there, other=0.0, cache_modifier=".cg")  # not what L1 held before
    left = left.to(b.dtype.element_ty)
    occurring = tl.reduce(tl.full((BLOCK_T,), 1, dtype=tl.int64) << tl.minimum(own, BITS), 0, either)
    for start in range(1, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_read = (n < N) & ((occurring >> tl.minimum(n, BITS)) & 1 > 0)
        if tl.max(is_read.to(tl.int32), axis=0) > 0:
            mine = tl.where((own[:, None] == n[None, :])[:, :, None], left[:, None, :], tl.zeros_like(left)[:, None, :])
            row = tl.reshape(n[:, None] * R + r[None, :], (BLOCK_N * BLOCK_R,))
            is_row = tl.reshape(is_read[:, None] & is_r[None, :], (BLOCK_N * BLOCK_R,))
            right = tl.load(b + row.to(tl.int64)[:, None] * F + f[None, :], mask=is_row[:, None], other=0.0)
            mine = tl.reshape(mine, (BLOCK_T, BLOCK_N * BLOCK_R))
            total = tl.dot(mine, right, total, input_precision=PRECISION)
    at = out + T * begin.to(tl.int64) + t.to(tl.int64)[:, None] * width + (f - begin)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(t < T)[:, None])

    if tl.atomic_add(counts + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:  # the next launch begins with zeros
        tl.atomic_xchg(counts, 0)
        tl.atomic_xchg(counts + 1, 0)
