"""Llama, models of its shape (SmolLM2, TinyLlama), and Mistral, which adds a sliding window.

llama.cpp has one architecture for all of them, without a window.
"""

from typing import Any

from veneer.model.families.family import DecoderNames, Family, GgufNames, sizes

_IN_GGUF = GgufNames("llama", rope_types=("default", "linear", "llama3", "yarn"), pairs_are_neighbours=True)
_SMOLLM: dict[str, Any] = {"vocab_size": 49152, "max_position_embeddings": 8192}
_LLAMA2: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 4096, "dtype": "float16"}
_LLAMA30: dict[str, Any] = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
_LLAMA3 = _LLAMA30 | {"max_position_embeddings": 131072}

_LLAMAS: tuple[dict[str, Any], ...] = (
    {
        "smollm2-135m": sizes(576, 1536, 30, 9, 3, True, **_SMOLLM),
        "smollm2-360m": sizes(960, 2560, 32, 15, 5, True, **_SMOLLM),
        "smollm2-1.7b": sizes(2048, 8192, 24, 32, 32, True, **_SMOLLM),
    },
    {"tinyllama-1.1b": sizes(2048, 5632, 22, 32, 4, vocab_size=32000, max_position_embeddings=2048)},
    {
        "llama-2-7b": sizes(4096, 11008, 32, 32, 32, **_LLAMA2),
        "llama-2-13b": sizes(5120, 13824, 40, 40, 40, **_LLAMA2),
        "llama-2-70b": sizes(8192, 28672, 80, 64, 8, **_LLAMA2),
    },
    {
        "llama-3-8b": sizes(4096, 14336, 32, 32, 8, **_LLAMA30),
        "llama-3-70b": sizes(8192, 28672, 80, 64, 8, **_LLAMA30),
    },
    {
        "llama-3.2-1b": sizes(2048, 8192, 16, 32, 8, True, head_dim=64, **_LLAMA3),
        "llama-3.2-3b": sizes(3072, 8192, 28, 24, 8, True, head_dim=128, **_LLAMA3),
        "llama-3.1-8b": sizes(4096, 14336, 32, 32, 8, **_LLAMA3),
        "llama-3.1-70b": sizes(8192, 28672, 80, 64, 8, **_LLAMA3),
        "llama-3.3-70b": sizes(8192, 28672, 80, 64, 8, **_LLAMA3),
    },
)
_MISTRAL: dict[str, Any] = sizes(4096, 14336, 32, 32, 8, vocab_size=32000, max_position_embeddings=32768)
_MISTRALS = ({"mistral-7b": _MISTRAL}, {"mistral-7b-v0.3": _MISTRAL | {"vocab_size": 32768, "sliding_window": None}})

LLAMA = Family("llama", "Llama", DecoderNames(), _IN_GGUF, published=_LLAMAS)
MISTRAL = Family("mistral", "Mistral", DecoderNames(), _IN_GGUF, published=_MISTRALS)
