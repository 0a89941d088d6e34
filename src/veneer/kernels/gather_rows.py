"""Gathers rows of a matrix that lives in pinned host memory, which a GPU reads over its link: only the rows needed.

Shapes: V rows, D width, T tokens.
"""

import torch

from veneer.kernels.launch import launch, tl, triton

BLOCK = 1024


def gather_rows(matrix_VD: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
    """Return rows of a matrix as a tensor (T, D) on the device of the ids.

    Args:
        matrix_VD: matrix, on the same device or, for a GPU, in pinned host memory; contiguous.
        ids_T: numbers of rows, int64.
    """
    if not ids_T.is_cuda:
        return matrix_VD[ids_T]
    T, D = len(ids_T), matrix_VD.shape[1]
    out_TD = torch.empty((T, D), dtype=matrix_VD.dtype, device=ids_T.device)
    launch(_gather, (T, triton.cdiv(D, BLOCK)))(out_TD, matrix_VD, ids_T, D, BLOCK=BLOCK, num_warps=4)
    return out_TD


@triton.jit
def _gather(out, matrix, ids, D, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + t)
    tl.store(out + t * D + d, tl.load(matrix + row * D + d, mask=d < D, other=0.0), mask=d < D)
