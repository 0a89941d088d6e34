"""The description of a model family: the facts in which it differs from Llama.

`decoder` is read by the fused engine, `gguf` by the export, `published` by plans that need no network. A family may
leave any of them out: any architecture of Transformers trains on the reference engine without a description.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderNames:
    """Paths of the modules in a decoder layer that the fused engine reads. The defaults are Llama's.

    Attributes:
        qkv, o, gate_up, down: linear layers; one path of `qkv` or `gate_up` is a fused product.
        norm1, norm2: norms before attention and before the MLP.
        post1, post2: norms on the outputs of attention and of the MLP, or None.
        head_norms: norms of each head of q and of k, or None.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    post1: str | None = None
    post2: str | None = None
    head_norms: tuple[str, str] | None = None


@dataclass(frozen=True)
class GgufNames:
    """The form of a family in llama.cpp. The `gguf` package owns the names of its keys and tensors.

    Attributes:
        arch: name of its architecture.
        rope_types: kinds of rotary positions that it computes.
        pairs_are_neighbours: whether rotary pairs are neighbours there; in Transformers they are halves of a head.
        always_ties: whether it cannot store a head beside the embeddings.
        head_width: case in which the file states the width of a head: "always", "unusual" (not hidden size / heads) or
            "never".
        settings: further keys of the file, each with the setting of config.json that it holds and its type.
        refusal: function that returns the part of a configuration that it cannot express, or None.
    """

    arch: str
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    pairs_are_neighbours: bool = False
    always_ties: bool = False
    head_width: str = "unusual"
    settings: tuple[tuple[str, str, type[int] | type[float]], ...] = ()
    refusal: Callable[[Any], str | None] = lambda config: None


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: name in Transformers.
        title: name to display.
        decoder: modules of a decoder layer; None: the fused engine does not cover it.
        gguf: form in llama.cpp; None: it cannot be exported.
        norm_offset: 1 where the weights of norms are stored as differences from 1, else 0.
        published: series of published models, each from small to large with one tokenizer: settings of config.json by
            the hub's name without owner and ending. The dtype is bfloat16 unless they name another.
    """

    model_type: str
    title: str
    decoder: DecoderNames | None = None
    gguf: GgufNames | None = None
    norm_offset: float = 0.0
    published: tuple[dict[str, dict[str, Any]], ...] = ()


def sizes(hidden: int, inner: int, depth: int, heads: int, kv: int, tied: bool = False, **more: Any) -> dict[str, Any]:
    """Return the settings of a published decoder."""
    return {
        **{"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": depth, "num_attention_heads": heads},
        **{"num_key_value_heads": kv, "tie_word_embeddings": tied},
        **more,
    }
