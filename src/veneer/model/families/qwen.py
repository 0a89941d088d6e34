"""Qwen2 (2 and 2.5) has biases on q, k and v; Qwen3 has a norm on each head of q and k instead."""

from typing import Any

from veneer.model.families.family import DecoderNames, Family, GgufNames, sizes

_QWEN2: dict[str, Any] = {"vocab_size": 151936, "max_position_embeddings": 32768}
_LARGE = _QWEN2 | {"vocab_size": 152064}
_QWEN3: dict[str, Any] = {"vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}

_QWENS2: tuple[dict[str, Any], ...] = (
    {
        "qwen2-0.5b": sizes(896, 4864, 24, 14, 2, True, **_QWEN2),
        "qwen2-1.5b": sizes(1536, 8960, 28, 12, 2, True, **_QWEN2),
        "qwen2-7b": sizes(3584, 18944, 28, 28, 4, **_LARGE),
    },
    {
        "qwen2.5-0.5b": sizes(896, 4864, 24, 14, 2, True, **_QWEN2),
        "qwen2.5-1.5b": sizes(1536, 8960, 28, 12, 2, True, **_QWEN2),
        "qwen2.5-3b": sizes(2048, 11008, 36, 16, 2, True, **_QWEN2),
        "qwen2.5-7b": sizes(3584, 18944, 28, 28, 4, **_LARGE),
        "qwen2.5-14b": sizes(5120, 13824, 48, 40, 8, **_LARGE),
        "qwen2.5-32b": sizes(5120, 27648, 64, 40, 8, **_LARGE),
        "qwen2.5-72b": sizes(8192, 29568, 80, 64, 8, **_LARGE),
    },
)
_QWENS3: dict[str, Any] = {
    "qwen3-0.6b": sizes(1024, 3072, 28, 16, 8, True, **_QWEN3),
    "qwen3-1.7b": sizes(2048, 6144, 28, 16, 8, True, **_QWEN3),
    "qwen3-4b": sizes(2560, 9728, 36, 32, 8, True, **_QWEN3),
    "qwen3-8b": sizes(4096, 12288, 36, 32, 8, **_QWEN3),
    "qwen3-14b": sizes(5120, 17408, 40, 40, 8, **_QWEN3),
    "qwen3-32b": sizes(5120, 25600, 64, 64, 8, **_QWEN3),
}
_WITH_HEAD_NORMS = DecoderNames(head_norms=("self_attn.q_norm", "self_attn.k_norm"))

QWEN2 = Family("qwen2", "Qwen2", DecoderNames(), GgufNames("qwen2"), published=_QWENS2)
QWEN3 = Family("qwen3", "Qwen3", _WITH_HEAD_NORMS, GgufNames("qwen3"), published=(_QWENS3,))
