"""Gemma 2 has four norms a layer with weights around zero, soft caps, and a window in every other layer."""

from typing import Any

from veneer.model.families.family import DecoderNames, Family, GgufNames, sizes

_GEMMA2: dict[str, Any] = {"vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192}


def _refusal(config: Any) -> str | None:
    """Refuse a scale of attention other than the one that llama.cpp derives from the depth (27B, or all others)."""
    usual = config.head_dim if config.num_hidden_layers != 46 else config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar == usual:
        return None
    return f"query_pre_attn_scalar = {config.query_pre_attn_scalar} (only {usual})"


_NAMES = DecoderNames(
    norm2="pre_feedforward_layernorm", post1="post_attention_layernorm", post2="post_feedforward_layernorm"
)
_SETTINGS = (
    ("attn_logit_softcapping", "attn_logit_softcapping", float),
    ("final_logit_softcapping", "final_logit_softcapping", float),
    ("attention.sliding_window", "sliding_window", int),
)
_IN_GGUF = GgufNames("gemma2", always_ties=True, head_width="always", settings=_SETTINGS, refusal=_refusal)
_GEMMAS = {
    "gemma-2-2b": sizes(2304, 9216, 26, 8, 4, True, **_GEMMA2),
    "gemma-2-9b": sizes(3584, 14336, 42, 16, 8, True, **_GEMMA2),
    "gemma-2-27b": sizes(4608, 36864, 46, 32, 16, True, **_GEMMA2 | {"head_dim": 128}),
}

GEMMA2 = Family("gemma2", "Gemma 2", _NAMES, _IN_GGUF, norm_offset=1.0, published=(_GEMMAS,))
