"""What a model family is: the facts in which it differs from Llama, for whoever must know them.

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
        qkv, o, gate_up, down: Linear layers; one path of `qkv` or `gate_up` is a fused product.
        norm1, norm2: Norms before attention and before the MLP; post1, post2: on their outputs, or None.
        head_norms: Norms of each head of q and of k, or None.
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
    """What llama.cpp calls a family. The `gguf` package owns the names of its keys and tensors.

    Attributes:
        arch: Its architecture there.
        rope_types: Kinds of rotary positions that it computes.
        pairs_are_neighbours: Whether rotary pairs are neighbours there; in Transformers they are halves of a head.
        always_ties: Whether it has no place for a head beside the embeddings.
        head_width: When the file states the width of a head: "always", "unusual" (not hidden size / heads), "never".
        settings: Further keys of the file, each with the setting of config.json that it holds and its type.
        refusal: Says what of a configuration it has no word for; None: nothing.
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
        model_type: Its name in Transformers.
        title: Its name for a person.
        decoder: Modules of a decoder layer; None: the fused engine does not compute it.
        gguf: Its form in llama.cpp; None: it cannot be exported.
        norm_offset: 1 where the weights of norms are stored as differences from 1, else 0.
        published: Series of published models, each from small to large with one tokenizer: settings of config.json by
            the hub's name without owner and ending. Published in bfloat16 where they do not say otherwise.
    """

    model_type: str
    title: str
    decoder: DecoderNames | None = None
    gguf: GgufNames | None = None
    norm_offset: float = 0.0
    published: tuple[dict[str, dict[str, Any]], ...] = ()


def sizes(hidden: int, inner: int, depth: int, heads: int, kv: int, tied: bool = False, **more: Any) -> dict[str, Any]:
    """Settings of a published decoder."""
    return {
        **{"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": depth, "num_attention_heads": heads},
        **{"num_key_value_heads": kv, "tie_word_embeddings": tied},
        **more,
    }
