"""Where a kernel runs: Triton on a GPU (or in its interpreter), else the plain torch twin.

Every operation here has two bodies with one signature. `runs_triton` decides between them, so that machines without
Triton compute the same thing, and a test can ask for either.

On meta tensors, which have no data, a kernel is launched for nothing: a dry run on them goes Triton's
way, makes the tensors that Triton's way makes, and `LISTENERS` hear what each launch would have read and written.
"""

import os
from collections.abc import Callable, Sequence
from subprocess import CalledProcessError
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton import TritonError

    HAS_TRITON = True
except ImportError:  # not on every platform; the twins do without

    class _Absent:
        """Lets kernels be defined and run dry, not launched."""

        constexpr = Any
        bfloat16 = float16 = float32 = None

        def jit(self, function: Any) -> Any:
            return function

        def cdiv(self, whole: int, part: int) -> int:
            return -(-whole // part)

        def next_power_of_2(self, number: int) -> int:
            return 1 << (number - 1).bit_length()

    class TritonError(Exception):  # type: ignore[no-redef]
        """Not raised by anything."""

    triton = tl = _Absent()
    HAS_TRITON = False

# What a kernel raises that this machine cannot build or run: Triton's own are no RuntimeErrors, and where its launcher
# cannot be compiled (no Python headers), it is the compiler that failed.
KERNEL_ERRORS = (RuntimeError, TritonError, CalledProcessError)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether kernels on this tensor are Triton's."""
    return tensor.is_cuda or tensor.is_meta or INTERPRETED


LISTENERS: list[Callable[[list[torch.Tensor]], None]] = []  # hear of launches on meta tensors


def launch(kernel: Any, grid: tuple[int, ...], also: Sequence[torch.Tensor] = ()) -> Callable[..., None]:
    """`kernel[grid]`, whose first argument must be a tensor.

    Args:
        kernel: Triton's.
        grid: Programs.
        also: Tensors it touches beside its arguments, or once more: read by address, or read and written.
    """

    def start(first: torch.Tensor, *more: Any, **constants: Any) -> None:
        if not first.is_meta:
            kernel[grid](first, *more, **constants)
            return
        touched = {id(tensor): tensor for tensor in (first, *more) if isinstance(tensor, torch.Tensor)}
        for hear in LISTENERS:
            hear([*touched.values(), *also])

    return start


def power_of_2(number: int) -> int:
    """The next power of two, at least 16: the smallest side of a matrix product."""
    return max(16, 1 << (number - 1).bit_length())


__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "KERNEL_ERRORS",
    "LISTENERS",
    "TritonError",
    "launch",
    "power_of_2",
    "runs_triton",
    "tl",
    "triton",
]
