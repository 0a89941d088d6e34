"""Phi-3 computes q, k and v by one product, and gate and up by another, in Transformers as in llama.cpp."""

from veneer.model.families.family import DecoderNames, Family, GgufNames, sizes

_NAMES = DecoderNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
_WINDOW = ("attention.sliding_window", "sliding_window", int)
_IN_GGUF = GgufNames("phi3", rope_types=("default", "longrope"), head_width="never", settings=(_WINDOW,))
_MINI = sizes(3072, 8192, 32, 32, 32, vocab_size=32064, max_position_embeddings=4096, pad_token_id=32000)

PHI3 = Family("phi3", "Phi-3", _NAMES, _IN_GGUF, published=({"phi-3-mini-4k": _MINI},))
