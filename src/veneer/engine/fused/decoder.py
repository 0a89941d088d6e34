"""Reads the parts of a model that the fused engine computes with, from Transformers' and PEFT's modules in place.

Llama-like decoders differ in few ways; model/families/ describes those of a family, the model's configuration its own.
A model that differs in another way is not covered; `NotCoveredError` names the difference.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from veneer.engine.fused.group import Linear
from veneer.engine.positions import switch_of
from veneer.kernels.gated_mlp import ACTIVATIONS
from veneer.kernels.rope import HeadNorm, Heads
from veneer.model.adapters.from_base import FROM_BASE, starts_from_base
from veneer.model.adapters.lora import low_rank
from veneer.model.families import FAMILIES
from veneer.model.families.family import DecoderNames

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


class NotCoveredError(Exception):
    """Raised for a model with a part that the fused engine does not compute; the message names it."""


class Norm(NamedTuple):
    weight_D: torch.Tensor
    eps: float
    offset: float  # 1 where weights are stored as differences from 1


class Layer(NamedTuple):
    """The parts of one decoder block.

    Attributes:
        qkv, o, gate_up, down: linear layers of each group.
        norm1, norm2: norms before attention and before the MLP.
        post1, post2: norms on the output of attention and of the MLP (Gemma 2), or None.
        head_norm: norms of each head of q and k (Qwen3), or None.
        window: tokens that a query sees; 0: all.
    """

    qkv: tuple[Linear, ...]
    o: Linear
    gate_up: tuple[Linear, ...]
    down: Linear
    norm1: Norm
    norm2: Norm
    post1: Norm | None
    post2: Norm | None
    head_norm: HeadNorm | None
    window: int


class Decoder(NamedTuple):
    """The parts of a whole model."""

    layers: tuple[Layer, ...]
    heads: Heads
    scale: float
    softcap: float
    activation: int
    embed: Any
    norm: Norm
    head: Any
    head_cap: float
    rotary: Any
    longest: int | None

    @property
    def device(self) -> torch.device:
        """The device that computes: that of its norms, since other weights may be on the host."""
        return self.norm.weight_D.device


def read(model: Any) -> Decoder:
    """Read the parts of a PEFT model.

    Raises:
        NotCoveredError: it has parts that the fused engine does not compute.
    """
    base = model.get_base_model()
    adapter = getattr(model, "peft_config", {}).get("default")
    if starts_from_base(adapter):
        raise NotCoveredError(f"adapters of the method {FROM_BASE.name}")
    config = base.config
    family = FAMILIES.get(config.model_type)
    if family is None or family.decoder is None:
        covered = ", ".join(known.model_type for known in FAMILIES.values() if known.decoder)
        raise NotCoveredError(f"the architecture {config.model_type} (covered: {covered})")
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise NotCoveredError(f"rotary positions of the kind {rope_type}")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise NotCoveredError(f"the activation {activation}")
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "resid_pdrop", 0.0):
        raise NotCoveredError("dropout within the base model")
    inner = base.base_model
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, size)
    offset, first = family.norm_offset, inner.layers[0].self_attn
    layers = tuple(_layer(layer, n, config, family.decoder, offset) for n, layer in enumerate(inner.layers))
    head = base.get_output_embeddings()
    for module, what in ((inner.embed_tokens, "embeddings"), (head, "head")):
        if type(module).__module__.startswith("peft") or module.weight.requires_grad:
            raise NotCoveredError(f"an adapter on the {what}")
    if type(head) is not torch.nn.Linear or getattr(head, "bias", None) is not None:
        raise NotCoveredError(f"a head of the kind {type(head).__name__}")
    adapted = [linear for layer in layers for linear in _linears(layer) if linear.a is not None]
    expected = sum(2 if linear.magnitude is None else 3 for linear in adapted)
    found = sum(1 for parameter in model.parameters() if parameter.requires_grad)
    if expected != found:
        raise NotCoveredError(f"{found - expected} trainable parameters outside the blocks' linear layers")
    return Decoder(
        layers, heads, float(first.scaling), float(getattr(config, "attn_logit_softcapping", None) or 0.0),
        ACTIVATIONS[activation], inner.embed_tokens, _norm(inner.norm, offset), head,
        float(getattr(config, "final_logit_softcapping", None) or 0.0), inner.rotary_emb, switch_of(config),
    )  # fmt: skip


def _linears(layer: Layer) -> tuple[Linear, ...]:
    return (*layer.qkv, layer.o, *layer.gate_up, layer.down)


def _layer(layer: Any, number: int, config: Any, names: DecoderNames, offset: float) -> Layer:
    types = getattr(config, "layer_types", None)
    slides = types[number] == "sliding_attention" if types else getattr(config, "use_sliding_window", True)
    window = (getattr(config, "sliding_window", None) or 0) if slides else 0
    head_norm = None
    if names.head_norms is not None:
        q_norm, k_norm = (layer.get_submodule(name) for name in names.head_norms)
        head_norm = HeadNorm(q_norm.weight.data, k_norm.weight.data, q_norm.variance_epsilon)

    def linear(path: str) -> Linear:
        return _linear(layer.get_submodule(path), f"layers.{number}.{path}")

    def norm(path: str) -> Norm:
        return _norm(layer.get_submodule(path), offset)

    return Layer(
        _group(map(linear, names.qkv)),
        linear(names.o),
        _group(map(linear, names.gate_up)),
        linear(names.down),
        norm(names.norm1),
        norm(names.norm2),
        norm(names.post1) if names.post1 else None,
        norm(names.post2) if names.post2 else None,
        head_norm,
        window,
    )


def _norm(module: Any, offset: float) -> Norm:
    return Norm(module.weight.data, module.eps if hasattr(module, "eps") else module.variance_epsilon, offset)


def _group(linears: Iterable[Linear]) -> tuple[Linear, ...]:
    """Group linear layers that share an input, and so one matrix."""
    found = tuple(linears)
    names = ", ".join(linear.name for linear in found)
    if len({getattr(linear.module.weight, "quant_state", None) is None for linear in found}) > 1:
        raise NotCoveredError(f"{names}: some in 4 bits and some not")
    if len({linear.dropout for linear in found if linear.a is not None}) > 1:
        raise NotCoveredError(f"{names}: adapters of several dropouts")
    return found


def _linear(module: Any, name: str) -> Linear:
    if not hasattr(module, "base_layer"):
        return Linear(name, _frozen(module, name))
    found = low_rank(module, or_dora=True)
    if found is None or module.active_adapters != ["default"]:
        raise NotCoveredError(f"{name}: an adapter other than one plain LoRA or DoRA")
    frozen = _frozen(module.base_layer, name)
    return Linear(name, frozen, found.a_RI, found.b_OR, found.scale, found.dropout, found.magnitude_O)


def _frozen(module: Any, name: str) -> Any:
    state = getattr(module.weight, "quant_state", None)
    if type(module) is not torch.nn.Linear and state is None:
        raise NotCoveredError(f"{name}: a layer of the kind {type(module).__name__}")
    if state is not None and (state.blocksize != 64 or module.in_features % 64):
        raise NotCoveredError(f"{name}: 4-bit weights in blocks that cross rows")
    return module
