"""Tiny random models of real families, and a tiny byte-level tokenizer with a chat template."""

from functools import cache
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


def save_tiny_model(family: tuple[str, dict[str, Any]], folder: Path, chat: bool = True) -> None:
    """Write a tiny random model with its tokenizer, as `save_pretrained` does. Weights float32, seeded."""
    import transformers

    name, settings = family
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)


@cache
def family_tokenizer() -> Any:
    """The tiny tokenizer with the end-of-turn tokens of Llama 3, Gemma and Phi-3 as well."""
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<end_of_turn>", "<|end|>"]})
    return tokenizer


@cache
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


@cache
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
