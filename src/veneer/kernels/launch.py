"""Where a kernel runs: Triton on a GPU (or in its interpreter), else the plain torch twin.

Every operation here has two bodies with one signature. `runs_triton` decides between them, so that machines without
Triton compute the same thing, and a test can ask for either.
"""

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the twins do without

    class _Absent:
        """Lets kernels be defined, not launched."""

        constexpr = Any

        def jit(self, function: Any) -> Any:
            return function

    triton = tl = _Absent()

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether kernels on this tensor are Triton's."""
    return tensor.is_cuda or INTERPRETED


def power_of_2(number: int) -> int:
    """The next power of two, at least 16: the smallest side of a matrix product."""
    return max(16, 1 << (number - 1).bit_length())


__all__ = ["INTERPRETED", "power_of_2", "runs_triton", "tl", "triton"]
