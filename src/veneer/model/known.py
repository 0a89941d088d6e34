"""Published shapes of common base models, so that a plan for one needs no network.

The numbers are those of the models' own config.json on the hub. Only repositories of their makers, and faithful copies
(unsloth, NousResearch), are known by name; any other base is planned from its own configuration. Training does not
read this.
"""

from typing import Any

_LLAMA3 = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "dtype": "float16"}
_QWEN2 = {"vocab_size": 151936, "max_position_embeddings": 32768}
_QWEN3 = {"vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}
_GEMMA2 = {"vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192}


def _decoder(
    hidden: int, inner: int, depth: int, heads: int, kv: int, tied: Any = False, **more: Any
) -> dict[str, Any]:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }
    return sizes | {"num_key_value_heads": kv, "tie_word_embeddings": tied} | more


def _gpt2(width: int, depth: int, heads: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": depth, "n_head": heads, "dtype": "float32"}


def _opt(width: int, depth: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": depth, "num_attention_heads": heads}
    return sizes | {"word_embed_proj_dim": width, "max_position_embeddings": 2048, "dtype": "float16"}


# Name without owner and ending: model type, settings. Published in bfloat16 where they do not say otherwise.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": ("llama", _decoder(576, 1536, 30, 9, 3, True, vocab_size=49152, max_position_embeddings=8192)),
    "smollm2-360m": ("llama", _decoder(960, 2560, 32, 15, 5, True, vocab_size=49152, max_position_embeddings=8192)),
    "smollm2-1.7b": ("llama", _decoder(2048, 8192, 24, 32, 32, True, vocab_size=49152, max_position_embeddings=8192)),
    "tinyllama-1.1b": ("llama", _decoder(2048, 5632, 22, 32, 4, vocab_size=32000, max_position_embeddings=2048)),
    "llama-2-7b": ("llama", _decoder(4096, 11008, 32, 32, 32, **_LLAMA2)),
    "llama-2-13b": ("llama", _decoder(5120, 13824, 40, 40, 40, **_LLAMA2)),
    "llama-2-70b": ("llama", _decoder(8192, 28672, 80, 64, 8, **_LLAMA2)),
    "llama-3-8b": ("llama", _decoder(4096, 14336, 32, 32, 8, **_LLAMA3 | {"max_position_embeddings": 8192})),
    "llama-3-70b": ("llama", _decoder(8192, 28672, 80, 64, 8, **_LLAMA3 | {"max_position_embeddings": 8192})),
    "llama-3.1-8b": ("llama", _decoder(4096, 14336, 32, 32, 8, **_LLAMA3)),
    "llama-3.1-70b": ("llama", _decoder(8192, 28672, 80, 64, 8, **_LLAMA3)),
    "llama-3.2-1b": ("llama", _decoder(2048, 8192, 16, 32, 8, True, head_dim=64, **_LLAMA3)),
    "llama-3.2-3b": ("llama", _decoder(3072, 8192, 28, 24, 8, True, head_dim=128, **_LLAMA3)),
    "llama-3.3-70b": ("llama", _decoder(8192, 28672, 80, 64, 8, **_LLAMA3)),
    "mistral-7b": ("mistral", _decoder(4096, 14336, 32, 32, 8, vocab_size=32000, max_position_embeddings=32768)),
    "mistral-7b-v0.3": (
        "mistral",
        _decoder(4096, 14336, 32, 32, 8, vocab_size=32768, max_position_embeddings=32768, sliding_window=None),
    ),
    "qwen2-0.5b": ("qwen2", _decoder(896, 4864, 24, 14, 2, True, **_QWEN2)),
    "qwen2-1.5b": ("qwen2", _decoder(1536, 8960, 28, 12, 2, True, **_QWEN2)),
    "qwen2-7b": ("qwen2", _decoder(3584, 18944, 28, 28, 4, **_QWEN2 | {"vocab_size": 152064})),
    "qwen2.5-0.5b": ("qwen2", _decoder(896, 4864, 24, 14, 2, True, **_QWEN2)),
    "qwen2.5-1.5b": ("qwen2", _decoder(1536, 8960, 28, 12, 2, True, **_QWEN2)),
    "qwen2.5-3b": ("qwen2", _decoder(2048, 11008, 36, 16, 2, True, **_QWEN2)),
    "qwen2.5-7b": ("qwen2", _decoder(3584, 18944, 28, 28, 4, **_QWEN2 | {"vocab_size": 152064})),
    "qwen2.5-14b": ("qwen2", _decoder(5120, 13824, 48, 40, 8, **_QWEN2 | {"vocab_size": 152064})),
    "qwen2.5-32b": ("qwen2", _decoder(5120, 27648, 64, 40, 8, **_QWEN2 | {"vocab_size": 152064})),
    "qwen2.5-72b": ("qwen2", _decoder(8192, 29568, 80, 64, 8, **_QWEN2 | {"vocab_size": 152064})),
    "qwen3-0.6b": ("qwen3", _decoder(1024, 3072, 28, 16, 8, True, **_QWEN3)),
    "qwen3-1.7b": ("qwen3", _decoder(2048, 6144, 28, 16, 8, True, **_QWEN3)),
    "qwen3-4b": ("qwen3", _decoder(2560, 9728, 36, 32, 8, True, **_QWEN3)),
    "qwen3-8b": ("qwen3", _decoder(4096, 12288, 36, 32, 8, **_QWEN3)),
    "qwen3-14b": ("qwen3", _decoder(5120, 17408, 40, 40, 8, **_QWEN3)),
    "qwen3-32b": ("qwen3", _decoder(5120, 25600, 64, 64, 8, **_QWEN3)),
    "gemma-2-2b": ("gemma2", _decoder(2304, 9216, 26, 8, 4, True, **_GEMMA2)),
    "gemma-2-9b": ("gemma2", _decoder(3584, 14336, 42, 16, 8, True, **_GEMMA2)),
    "gemma-2-27b": ("gemma2", _decoder(4608, 36864, 46, 32, 16, True, **_GEMMA2 | {"head_dim": 128})),
    "phi-3-mini-4k": (
        "phi3",
        _decoder(3072, 8192, 32, 32, 32, vocab_size=32064, max_position_embeddings=4096, pad_token_id=32000),
    ),
    "gpt2": ("gpt2", _gpt2(768, 12, 12)),
    "gpt2-medium": ("gpt2", _gpt2(1024, 24, 16)),
    "gpt2-large": ("gpt2", _gpt2(1280, 36, 20)),
    "gpt2-xl": ("gpt2", _gpt2(1600, 48, 25)),
    "opt-125m": ("opt", _opt(768, 12, 12)),
    "opt-1.3b": ("opt", _opt(2048, 24, 32)),
    "opt-6.7b": ("opt", _opt(4096, 32, 32)),
}
# Models of one family, from small to large: one tokenizer, one way of being trained.
FAMILIES = (
    ("smollm2-135m", "smollm2-360m", "smollm2-1.7b"),
    ("llama-2-7b", "llama-2-13b", "llama-2-70b"),
    ("llama-3-8b", "llama-3-70b"),
    ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.3-70b"),
    ("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b"),
    tuple(f"qwen2.5-{size}" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")),
    tuple(f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")),
    ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"),
    ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    ("opt-125m", "opt-1.3b", "opt-6.7b"),
)
MAKERS = {
    *("meta-llama", "huggingfacetb", "qwen", "mistralai", "google", "microsoft", "facebook", "openai-community"),
    *("tinyllama", "unsloth", "nousresearch"),
}
# From small to large, for "what would fit": one architecture in every common size, and a small one below.
_SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
MODEL_SIZES = ("HuggingFaceTB/SmolLM2-135M", *(f"Qwen/Qwen2.5-{size}" for size in _SIZES))
_ASIDE = {"meta", "instruct", "chat", "hf", "it", "base", "bnb", "4bit", "unsloth", "v0.1", "v0.2", "v1.0"}


def known_shape(name: str) -> tuple[str, dict[str, Any]] | None:
    """Model type and settings of a base by its hub id, or by its bare name; None: not known."""
    return KNOWN.get(_key(name))


def smaller_siblings(name: str) -> list[str]:
    """Hub ids of the smaller models of a base's family and kind (base, instruct, chat), by the same owner, the largest
    first; none where the family is not known, or has none.
    """
    key = _key(name)
    family = next((family for family in FAMILIES if key in family), ())
    return [_renamed(name, key, other) for other in reversed(family[: family.index(key)])] if family else []


def _key(name: str) -> str:
    """A hub id as KNOWN has it; nothing where its owner is not a maker."""
    owner, _, last = name.lower().rpartition("/")
    if owner and owner not in MAKERS:
        return ""
    return "-".join(word for word in last.split("-") if word not in _ASIDE)


def _renamed(name: str, key: str, other: str) -> str:
    """A hub id with one model of a family in the place of another, in the maker's spelling."""
    owner, slash, last = name.rpartition("/")
    words = last.split("-")
    at = next(n for n, word in enumerate(words) if word.lower() not in _ASIDE)
    before, old, after = words[:at], words[at : at + len(key.split("-"))], words[at + len(key.split("-")) :]
    spelled = {word.lower(): word for word in old}
    in_capitals = any(word[0].isdigit() and word != word.lower() for word in old)
    new = [spelled.get(word, word.upper() if in_capitals and word[0].isdigit() else word) for word in other.split("-")]
    if other.startswith("llama-3.2"):  # only earlier ones are called Meta-Llama
        before = []
    return owner + slash + "-".join([*before, *new, *after])
