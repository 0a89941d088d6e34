"""GPT-2 and OPT train on the reference engine and are not exported; plans use their published shapes."""

from typing import Any

from veneer.model.families.family import Family


def _gpt2(width: int, depth: int, heads: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": depth, "n_head": heads, "dtype": "float32"}


def _opt(width: int, depth: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return sizes | {"word_embed_proj_dim": width, "max_position_embeddings": 2048, "dtype": "float16"}


_GPTS = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}
_OPTS = {"opt-125m": _opt(768, 12, 12), "opt-1.3b": _opt(2048, 24, 32), "opt-6.7b": _opt(4096, 32, 32)}

GPT2 = Family("gpt2", "GPT-2", published=(_GPTS,))
OPT = Family("opt", "OPT", published=(_OPTS,))
