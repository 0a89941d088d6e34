"""Chooses the GGUF type of each tensor, and encodes tensors in it.

The K-quants are mixes: llama.cpp gives the tensors that hurt most (the head, part of V and of the down projections)
more bits than the rest. The mix here is llama.cpp's own for dense models, so that a `q4_k_m` made here is what others
mean by it. Rows that a type's blocks do not divide fall back to the next larger type with blocks of 32.

The arithmetic of quantization is llama.cpp's: `ggml_quantize_chunk` of the library inside the package `xllamacpp`.
Types that the `gguf` package can make itself (16 bits, Q8_0) do without.
"""

import ctypes
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from veneer.config import UserError
from veneer.config.options import require_known

ROWS_BYTES = 32 * 2**20  # of float32 that are quantized at a time
# Name: file type of the format, type of most tensors, bits a weight about.
QUANTS: dict[str, tuple[int, str, float]] = {
    "f32": (0, "F32", 32),
    "f16": (1, "F16", 16),
    "bf16": (32, "BF16", 16),
    "q8_0": (7, "Q8_0", 8.5),
    "q6_k": (18, "Q6_K", 6.6),
    "q5_k_m": (17, "Q5_K", 5.7),
    "q5_k_s": (16, "Q5_K", 5.5),
    "q4_k_m": (15, "Q4_K", 4.9),
    "q4_k_s": (14, "Q4_K", 4.6),
    "q4_0": (2, "Q4_0", 4.6),
    "q3_k_l": (13, "Q3_K", 4.3),
    "q3_k_m": (12, "Q3_K", 3.9),
    "q3_k_s": (11, "Q3_K", 3.5),
    "q2_k": (10, "Q2_K", 3.2),
}
_PLAIN = ("F32", "F16", "BF16")
_SELF_MADE = (*_PLAIN, "Q8_0")
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
BLOCK = {"Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}  # weights; all others 32, plain ones 1


@dataclass(frozen=True)
class Mix:
    """The types of one file.

    Attributes:
        quant: Name of the mix.
        depth: Layers of the model.
        shared_by: Query heads to a head of K and V.
        tied: Whether the embeddings are the head too.
    """

    quant: str
    depth: int
    shared_by: int
    tied: bool

    def type_of(self, name: str, shape: tuple[int, ...]) -> str:
        """Return the type of a tensor by its name in GGUF."""
        if len(shape) < 2:
            return "F32"
        wanted = self._wanted(name)
        if shape[-1] % BLOCK.get(wanted, 1 if wanted in _PLAIN else 32):
            wanted = _FALLBACK.get(wanted, "F16")
            if wanted != "F16" and shape[-1] % 32:
                wanted = "F16"
        return wanted

    def _wanted(self, name: str) -> str:
        usual = QUANTS[self.quant][1]
        if usual in _SELF_MADE:
            return usual
        parts = name.split(".")
        part = parts[2] if parts[0] == "blk" else parts[0]
        layer = int(parts[1]) if parts[0] == "blk" else 0
        if part == "output" or (part == "token_embd" and self.tied):
            return "Q6_K"
        return self._of_part(part, layer) or usual

    def _of_part(self, part: str, layer: int) -> str | None:
        depth, quant = self.depth, self.quant
        more = layer < depth // 8 or layer >= 7 * depth // 8 or (layer - depth // 8) % 3 == 2
        if part == "attn_v":
            return {
                "q2_k": "Q4_K" if self.shared_by >= 4 else "Q3_K",
                "q3_k_m": "Q5_K" if layer < 2 else "Q4_K",
                "q3_k_l": "Q5_K",
                "q4_k_s": "Q5_K" if layer < 4 else None,
                "q4_k_m": "Q6_K" if more else None,
                "q5_k_m": "Q6_K" if more else None,
            }.get(quant)
        if part == "ffn_down":
            return {
                "q2_k": "Q3_K",
                "q3_k_m": "Q5_K" if layer < depth // 16 else "Q4_K",
                "q3_k_l": "Q5_K",
                "q4_k_s": "Q5_K" if layer < depth // 8 else None,
                "q4_k_m": "Q6_K" if more else None,
                "q5_k_m": "Q6_K" if more else None,
            }.get(quant)
        if part == "attn_output":
            return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(quant)
        if part == "attn_qkv":
            return {"q3_k_m": "Q4_K", "q3_k_l": "Q4_K", "q4_k_m": "Q5_K", "q5_k_m": "Q6_K"}.get(quant)
        return None


def require_quant(quant: str) -> None:
    """Raise UserError for an unknown type, or one that needs a package that is not there."""
    require_known("--quant", quant)
    if QUANTS[quant][1] not in _SELF_MADE:
        _ggml()


def takes_importance(quant: str) -> bool:
    """Return whether a type chooses its scales by an importance matrix."""
    return quant in QUANTS and QUANTS[quant][1] not in _SELF_MADE


def size_of(kind: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor in a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return math.prod(shape) // int(block) * int(size)


def encoded(
    tensor: torch.Tensor, kind: str, name: str = "a weight", importance: torch.Tensor | None = None
) -> Iterator[Any]:
    """Encode a tensor in a type, row block after row block, as uint8 arrays.

    Args:
        tensor: Any float dtype; [rows, columns], or one row.
        kind: The type.
        name: Name of the tensor, for messages.
        importance: Weight of each column's error, float32 [columns]; None: all alike.

    Raises:
        UserError: A value does not fit F16.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, ROWS_BYTES // (4 * rows.shape[1]))
    blocks = [rows[at : at + step] for at in range(0, len(rows), step)]
    with ThreadPoolExecutor(2) as pool:
        for group in (blocks[at : at + 4] for at in range(0, len(blocks), 4)):
            yield from pool.map(lambda block: _encode(block, kind, name, importance), group)


def _encode(block: torch.Tensor, kind: str, name: str, importance: torch.Tensor | None) -> Any:
    values = np.ascontiguousarray(block.float().numpy())
    if kind == "F16" and np.abs(values).max(initial=0) > 65504:
        raise UserError(
            f"{name}: holds {np.abs(values).max():,.0f}, the largest number of f16 is 65,504: it would become infinite",
            "export with --quant bf16 or q8_0",
        )
    if kind in _SELF_MADE:
        from gguf import GGMLQuantizationType, quants

        return quants.quantize(values, GGMLQuantizationType[kind]).view(np.uint8).reshape(-1)
    from gguf import GGMLQuantizationType

    out = np.empty(size_of(kind, values.shape), dtype=np.uint8)
    number = int(GGMLQuantizationType[kind])
    weights = None if importance is None else np.ascontiguousarray(importance.float().cpu().numpy())
    pointer = None if weights is None else weights.ctypes.data
    written = _ggml()(number, values.ctypes.data, out.ctypes.data, 0, values.shape[0], values.shape[1], pointer)
    assert written == out.size
    return out


@cache
def _ggml() -> Any:
    """Return llama.cpp's quantizer: `size_t ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)`.

    The library is opened beside Python's own use of it, and only this function, whose signature has not changed since
    2023, is called.
    """
    try:
        import xllamacpp
    except ImportError:
        raise UserError(
            "--quant: K-quants and other types of 2 to 6 bits are made by llama.cpp, which is not installed",
            "pip install 'veneer[llamacpp]', or export with --quant q8_0, bf16 or f16",
        ) from None
    function = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    return function
