"""Launches a kernel by Triton on a GPU (or in its interpreter), else runs the plain torch twin.

Every operation has two implementations with one signature. `runs_triton` chooses between them, so that machines without
Triton compute the same, and a test can run either.

On meta tensors, which have no data, no kernel is launched: a dry run follows Triton's branch and allocates the same
tensors, and `LISTENERS` are called with the tensors that each launch would read and write.
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
except ImportError:  # not on every platform; the twins do not need it

    class _Absent:
        """A stand-in with which kernels can be defined and run dry, but not launched."""

        constexpr = Any
        bfloat16 = float16 = float32 = None

        def jit(self, function: Any = None, do_not_specialize: Sequence[str] = ()) -> Any:
            return self.jit if function is None else function

        def cdiv(self, whole: int, part: int) -> int:
            return -(-whole // part)

        def next_power_of_2(self, number: int) -> int:
            return 1 << (number - 1).bit_length()

    class TritonError(Exception):  # type: ignore[no-redef]
        """A stand-in that is never raised."""

    triton = tl = _Absent()
    HAS_TRITON = False

# Errors of kernels that this machine cannot build or run: Triton's own are no RuntimeErrors, and where its launcher
# cannot be compiled (no Python headers), the compiler's process fails.
KERNEL_ERRORS = (RuntimeError, TritonError, CalledProcessError)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(tensor: torch.Tensor) -> bool:
    """Return whether Triton's kernels are used on this tensor."""
    return tensor.is_cuda or tensor.is_meta or INTERPRETED


def compiles(device: torch.device) -> bool:
    """Return whether Triton compiles kernels for a device, a GPU since Ampere, where another way may be chosen."""
    return HAS_TRITON and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


LISTENERS: list[Callable[[list[torch.Tensor]], None]] = []  # called for launches on meta tensors


def launch(kernel: Any, grid: tuple[int, ...], also: Sequence[torch.Tensor] = ()) -> Callable[..., None]:
    """Return `kernel[grid]`, whose first argument must be a tensor.

    Args:
        kernel: Triton kernel.
        grid: numbers of programs.
        also: further tensors that it moves: read by address, or both read and written.
    """

    def start(first: torch.Tensor, *more: Any, **constants: Any) -> None:
        if not first.is_meta:
            kernel[grid](first, *more, **constants)
            return
        touched = {id(tensor): tensor for tensor in (first, *more) if isinstance(tensor, torch.Tensor)}
        for listener in LISTENERS:
            listener([*touched.values(), *also])

    return start


def power_of_2(number: int) -> int:
    """Return the next power of two, at least 16: the smallest side of a product in Triton."""
    return max(16, 1 << (number - 1).bit_length())


__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "KERNEL_ERRORS",
    "LISTENERS",
    "TritonError",
    "compiles",
    "launch",
    "power_of_2",
    "runs_triton",
    "tl",
    "triton",
]
