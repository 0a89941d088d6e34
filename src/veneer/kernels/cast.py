"""Casts all adapters to the compute dtype, each into the padding of a matrix of frozen weights, in one launch.

Master weights are float32 and change once a step; the large products read a 16-bit copy of them in the padding of their
matrices. Some hundred small copies would cost ten milliseconds of host time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from veneer.kernels.launch import launch, runs_triton, tl, triton

BLOCK = 4096


class Cast(NamedTuple):
    """The cast of one matrix: `target` (any strides) = `source` (contiguous, float32) times `factor`."""

    target: torch.Tensor
    source: torch.Tensor
    factor: float


class CastTable(NamedTuple):
    """The addresses of many casts, for one launch; the tensors must not move."""

    casts: tuple[Cast, ...]
    addresses: torch.Tensor
    factors: torch.Tensor
    member_of: torch.Tensor


def cast_table(casts: Sequence[Cast]) -> CastTable:
    """Collect the addresses of many casts."""
    device = casts[0].target.device if casts else torch.device("cpu")
    rows, members, first = [], [], 0
    for number, (target, source, _) in enumerate(casts):
        programs = triton.cdiv(source.numel(), BLOCK) if runs_triton(target) else 1
        strides = target.stride()
        rows.append([target.data_ptr(), source.data_ptr(), source.numel(), source.shape[1], *strides, first])
        members += [number] * programs
        first += programs
    return CastTable(
        tuple(casts),
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor([cast.factor for cast in casts], dtype=torch.float32, device=device),
        torch.tensor(members, dtype=torch.int32, device=device),
    )


def cast_all(table: CastTable) -> None:
    """Fill every target."""
    if not table.casts:
        return
    target = table.casts[0].target
    if not runs_triton(target):
        for target, source, factor in table.casts:
            target.copy_(source * factor)
        return
    dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[target.dtype]
    launch(_cast, (len(table.member_of),))(
        table.addresses, table.factors, table.member_of, DTYPE=dtype, BLOCK=BLOCK, num_warps=4
    )


@triton.jit
def _cast(addresses, factors, member_of, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    member = tl.load(member_of + program)
    line = addresses + member * 7
    target = tl.load(line).to(tl.pointer_type(DTYPE))
    source = tl.load(line + 1).to(tl.pointer_type(tl.float32))
    size, width = tl.load(line + 2), tl.load(line + 3)
    row, column = tl.load(line + 4), tl.load(line + 5)
    at = (program - tl.load(line + 6)) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < size, other=0.0) * tl.load(factors + member)
    tl.store(target + (at // width) * row + (at % width) * column, value.to(DTYPE), mask=at < size)
