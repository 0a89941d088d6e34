"""Dequantizes 4-bit weights: both levels of constants, and several matrices, in one launch.

bitsandbytes' format (arXiv 2305.14314): weights in blocks of 64 along the flattened matrix, two to a byte, the first in
the high half; each is an entry of a table of 16 values times its block's constant. With double quantization the
constant itself is an 8-bit entry of a table of 256 values times a float32 of 256 blocks, plus an offset.

Shapes: N outputs, D inputs; the result may have any row stride.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from veneer.kernels.launch import launch, runs_triton, tl, triton

BLOCK = 64  # weights that share a constant
ROWS = 64  # blocks per program
COPIED = 4096  # elements of an adapter's matrix per program


class PackedNF4(NamedTuple):
    """A quantized matrix, as bitsandbytes stores it.

    Attributes:
        weights: weights, two to a byte, uint8.
        constants: constants of the blocks: float32, or uint8 entries of `table256`.
        table16: values of a weight, float32.
        table256, scales, offset: values of a constant, scales (one for 256 constants) and an offset, float32; None
            without double quantization.
        shape: shape (N, D).
    """

    weights: torch.Tensor
    constants: torch.Tensor
    table16: torch.Tensor
    table256: torch.Tensor | None
    scales: torch.Tensor | None
    offset: torch.Tensor | None
    shape: tuple[int, int]

    @staticmethod
    def of(weight: Any) -> "PackedNF4":
        """Read a bitsandbytes Params4bit; shares its memory."""
        state = weight.quant_state
        nested = state.state2
        return PackedNF4(
            weight.data.view(-1).view(torch.uint8),  # they may be stored in another dtype
            state.absmax,
            state.code,
            nested.code if nested else None,
            nested.absmax if nested else None,
            state.offset.reshape(1) if nested else None,
            tuple(state.shape),
        )

    @property
    def large(self) -> tuple[torch.Tensor, ...]:
        """The tensors that grow with the matrix."""
        return tuple(t for t in (self.weights, self.constants, self.scales) if t is not None)

    def with_large(self, large: Sequence[torch.Tensor]) -> "PackedNF4":
        """Return the matrix with other tensors in place of `large`."""
        weights, constants, *scales = large
        return self._replace(weights=weights, constants=constants, scales=scales[0] if scales else None)

    def store_in(self, weight: Any) -> None:
        """Let a bitsandbytes Params4bit share the memory of these tensors."""
        state = weight.quant_state
        weight.data = self.weights.view(weight.dtype).view(weight.shape)
        state.absmax, state.code = self.constants, self.table16
        if state.state2 is not None and self.offset is not None:
            state.offset = self.offset.reshape(())
            state.state2.absmax, state.state2.code = self.scales, self.table256

    def to(self, device: torch.device) -> "PackedNF4":
        """Move it to a device."""
        return PackedNF4._make(t.to(device) if isinstance(t, torch.Tensor) else t for t in self)


class Table(NamedTuple):
    """The addresses of several matrices, for one launch; `keep` keeps these alive."""

    addresses: torch.Tensor
    programs: int
    double: bool
    keep: tuple[PackedNF4, ...]


def table_of(matrices: Sequence[PackedNF4]) -> Table:
    """Make the table of matrices that are stacked in the result; all have the same kind of constants."""
    rows, first, above = [], 0, 0
    for m in matrices:
        blocks = m.shape[0] * m.shape[1] // BLOCK
        pointers = [t.data_ptr() if t is not None else 0 for t in (m.weights, m.constants, m.scales, m.offset)]
        rows.append([*pointers, first, above])
        first, above = first + -(-blocks // ROWS), above + m.shape[0]
    addresses = torch.tensor(rows, dtype=torch.int64, device=matrices[0].weights.device)
    return Table(addresses, first, matrices[0].scales is not None, tuple(matrices))


def dequantize(
    table: Table, out_ND: torch.Tensor, a_RD: torch.Tensor | None = None, b_NR: torch.Tensor | None = None
) -> None:
    """Fill `out_ND`, of any row stride, with the stacked matrices of a table.

    Each matrix's D must be a multiple of 64, and so a block lies within a row.

    Args:
        out_ND: output of shape (N, D), or (N + R, D + R) with the two that follow.
        a_RD, b_NR: adapter matrices that are copied below and beside the others in the same launch; contiguous.
    """
    first = table.keep[0]
    N, D = sum(m.shape[0] for m in table.keep), first.shape[1]
    if not runs_triton(out_ND):
        above = 0
        for m in table.keep:
            out_ND[above : above + m.shape[0], :D] = _dequantize_torch(m)
            above += m.shape[0]
        if a_RD is not None and b_NR is not None:
            out_ND[N : N + len(a_RD), :D] = a_RD
            out_ND[:N, D : D + b_NR.shape[1]] = b_NR
        return
    counts = [m.shape[0] * D // BLOCK for m in table.keep] + [0, 0]
    starts = _starts(table)
    R = 0 if a_RD is None else len(a_RD)
    copies_a, copies_b = triton.cdiv(R * D, COPIED), triton.cdiv(N * R, COPIED)
    packed = [tensor for m in table.keep for tensor in (m.weights, m.constants)]
    launch(_dequantize, (table.programs + copies_a + copies_b,), packed)(
        table.addresses, first.table16, first.table256 if table.double else first.table16, out_ND,
        out_ND if a_RD is None else a_RD, out_ND if b_NR is None else b_NR, N, D, R, table.programs, copies_a,
        D // BLOCK, out_ND.stride(0), counts[0], counts[1], counts[2], starts[1], starts[2],
        DOUBLE=table.double, ROWS=ROWS, COPIED=COPIED, num_warps=4,
    )  # fmt: skip


def _starts(table: Table) -> list[int]:
    starts, first = [], 0
    for m in table.keep:
        starts.append(first)
        first += -(-(m.shape[0] * m.shape[1] // BLOCK) // ROWS)
    return [*starts, 1 << 30, 1 << 30]


def _dequantize_torch(m: PackedNF4) -> torch.Tensor:
    codes = torch.stack([m.weights >> 4, m.weights & 15], dim=1).view(-1)
    values = m.table16[codes.long()].view(-1, BLOCK)
    constants = m.constants
    if m.table256 is not None and m.scales is not None and m.offset is not None:
        scales = m.scales.repeat_interleave(256)[: len(constants)]
        constants = m.table256[constants.long()] * scales + m.offset
    return (values * constants[:, None]).view(m.shape)


@triton.jit
def _dequantize(
    addresses, table16, table256, out, a, b, N, D, R, programs, copies_a, blocks_a_row, stride,
    count0, count1, count2, start1, start2,
    DOUBLE: tl.constexpr, ROWS: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program >= programs + copies_a:
        at = (program - programs - copies_a) * COPIED + tl.arange(0, COPIED)
        value = tl.load(b + at, mask=at < N * R, other=0.0)
        tl.store(out + (at // R).to(tl.int64) * stride + D + at % R, value, mask=at < N * R)
        return
    if program >= programs:
        at = (program - programs) * COPIED + tl.arange(0, COPIED)
        value = tl.load(a + at, mask=at < R * D, other=0.0)
        tl.store(out + (N + at // D).to(tl.int64) * stride + at % D, value, mask=at < R * D)
        return
    member = (program >= start1).to(tl.int32) + (program >= start2).to(tl.int32)
    count = tl.where(member == 0, count0, tl.where(member == 1, count1, count2))
    line = addresses + member * 6
    weights = tl.load(line).to(tl.pointer_type(tl.uint8))
    block = (program - tl.load(line + 4)) * ROWS + tl.arange(0, ROWS)
    inside = block < count
    if DOUBLE:
        constants = tl.load(line + 1).to(tl.pointer_type(tl.uint8))
        scales = tl.load(line + 2).to(tl.pointer_type(tl.float32))
        offset = tl.load(tl.load(line + 3).to(tl.pointer_type(tl.float32)))
        entry = tl.load(constants + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(table256 + entry) * tl.load(scales + block // 256, mask=inside, other=0.0) + offset
    else:
        constants = tl.load(line + 1).to(tl.pointer_type(tl.float32))
        scale = tl.load(constants + block, mask=inside, other=0.0)
    half = tl.arange(0, 32)
    packed = tl.load(weights + block.to(tl.int64)[:, None] * 32 + half[None, :], mask=inside[:, None], other=0).to(
        tl.int32
    )
    high = tl.load(table16 + (packed >> 4)) * scale[:, None]
    low = tl.load(table16 + (packed & 15)) * scale[:, None]
    values = tl.reshape(tl.join(high, low), (ROWS, 64))
    row = (tl.load(line + 5) + block // blocks_a_row).to(tl.int64)
    column = (block % blocks_a_row) * 64
    index = (row * stride + column)[:, None] + tl.arange(0, 64)[None, :]
    tl.store(out + index, values.to(out.dtype.element_ty), mask=inside[:, None])
