"""Tiny random models of real families, and a tiny byte-level tokenizer with a chat template."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT: list[str] = [
    "what does the cat say please",
    "the dog and the owl and the hen",
    "route this message to the right team",
]

_COMMON: dict[str, Any] = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
_LLAMA_LIKE: dict[str, Any] = _COMMON | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# Family: the name of its configuration class in Transformers, and the settings that make it tiny.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "mistral": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        _LLAMA_LIKE | {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    ),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "gpt2": (
        "GPT2Config",
        _COMMON
        | {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "opt": (
        "OPTConfig",
        _COMMON
        | {
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
            "dropout": 0.0,
        },
    ),
}


_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_SMALL = _COMMON | {"hidden_size": 64, "num_hidden_layers": 2}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_GEMMA3 = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
# Architectures that are refused, or that only some commands take; see tests/unit/test_architectures.py.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoXConfig", _SMALL | {"intermediate_size": 128, "num_attention_heads": 4}),
    "gemma3": ("Gemma3TextConfig", _LLAMA_LIKE | _GEMMA3),
    "gemma3_vision": (
        "Gemma3Config",
        {
            **{"text_config": _LLAMA_LIKE | _GEMMA3, "vision_config": _VISION, "mm_tokens_per_image": 4},
            **{"boi_token_index": 6, "eoi_token_index": 7, "image_token_index": 5},
            **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2},
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        _LLAMA_LIKE | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _LLAMA_LIKE | _EXPERTS | {"head_dim": 16}),
    "mixtral": ("MixtralConfig", _LLAMA_LIKE | {"num_local_experts": 4, "sliding_window": None}),
    "deepseek_v3": (
        "DeepseekV3Config",
        _LLAMA_LIKE
        | _LATENT
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        _LLAMA_LIKE
        | _EXPERTS
        | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
        | {"linear_value_head_dim": 16, "shared_expert_intermediate_size": 32},
    ),
    "lfm2": ("Lfm2Config", _LLAMA_LIKE | {"layer_types": ["conv", "full_attention"]}),
    "llama4": (
        "Llama4TextConfig",
        _LLAMA_LIKE
        | {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 128, "attention_chunk_size": 64}
        | {"no_rope_layers": [1, 0]},
    ),
    "mamba": ("MambaConfig", _SMALL | {"state_size": 8}),
    "jamba": (
        "JambaConfig",
        _LLAMA_LIKE
        | {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 1, "mamba_d_state": 8}
        | {"use_mamba_kernels": False},
    ),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        _LLAMA_LIKE | _MAMBA | {"layer_types": ["mamba", "attention"], "num_local_experts": 0},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        _SMALL | {"intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 64},
    ),
    "rwkv": ("RwkvConfig", _SMALL | {"context_length": 256, "attention_hidden_size": 64}),
    "bert": ("BertConfig", _SMALL | {"intermediate_size": 128, "num_attention_heads": 4}),
    "bart": ("BartConfig", _COMMON | _BART | {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}),
}


def copied(make: Callable[..., Any]) -> Callable[..., Any]:
    """What a function makes is made once, and each caller gets a copy: a test may change its own."""
    made = cache(make)
    return wraps(make)(lambda *given, **named: deepcopy(made(*given, **named)))


def save_tiny_model(family: tuple[str, dict[str, Any]], folder: Path, chat: bool = True) -> None:
    """Write a tiny random model with its tokenizer, as `save_pretrained` does. Weights float32, seeded."""
    import transformers

    name, settings = family
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)


@copied
def family_tokenizer() -> Any:
    """The tiny tokenizer with the end-of-turn tokens of Llama 3, Gemma and Phi-3 as well."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<end_of_turn>", "<|end|>"]})
    return tokenizer


@copied
def metaspace_tokenizer() -> Any:
    """A BPE in the way of SentencePiece, as Llama 2's and Mistral's: spaces are signs, and a text begins with one."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)  # type: ignore[no-untyped-call, unused-ignore]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        TEXT * 9, trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@copied
def tiny_tokenizer(chat: bool = True) -> Any:
    """A byte-level BPE of 384 tokens with ChatML's control tokens; with ChatML as its template, or without one."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML if chat else None,
    )
