"""What the engine must know of a model: its parts, read from Transformers' and PEFT's modules in place.

Decoders of the Llama kind differ in few ways: biases on q, k and v (Qwen2), a norm on each head (Qwen3), fused
products (Phi-3), a sliding window (Mistral), four norms with weights around zero, capped scores and logits, scaled
embeddings (Gemma 2). A model that differs in another way is not covered; `NotCoveredError` says in which.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from veneer.engine.fused.group import Linear
from veneer.engine.positions import switch_of
from veneer.kernels.gated_mlp import ACTIVATIONS
from veneer.kernels.rope import HeadNorm, Heads

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


class NotCoveredError(Exception):
    """The model has something the fused engine does not compute; the message says what."""


class Norm(NamedTuple):
    weight_D: torch.Tensor
    eps: float
    offset: float  # 1 where weights are stored as differences from 1


class Layer(NamedTuple):
    """One decoder block's parts.

    Attributes:
        qkv, o, gate_up, down: Linears of each group.
        norm1, norm2: Before attention, before the MLP.
        post1, post2: On the output of attention and of the MLP (Gemma 2), or None.
        head_norm: Of q and k (Qwen3), or None.
        window: Tokens that attention looks back; 0: all.
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
    """A whole model's parts."""

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


def read(model: Any) -> Decoder:
    """Parts of a PEFT model.

    Raises:
        NotCoveredError: It has parts that the fused engine does not compute.
    """
    base = model.get_base_model()
    config = base.config
    if config.model_type not in FAMILIES:
        raise NotCoveredError(f"the architecture {config.model_type} (covered: {', '.join(FAMILIES)})")
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
    offset = 1.0 if config.model_type == "gemma2" else 0.0
    first = inner.layers[0].self_attn
    layers = tuple(_layer(layer, n, config, offset) for n, layer in enumerate(inner.layers))
    head = base.get_output_embeddings()
    for module, what in ((inner.embed_tokens, "embeddings"), (head, "head")):
        if type(module).__module__.startswith("peft") or module.weight.requires_grad:
            raise NotCoveredError(f"an adapter on the {what}")
    if type(head) is not torch.nn.Linear or getattr(head, "bias", None) is not None:
        raise NotCoveredError(f"a head of the kind {type(head).__name__}")
    expected = sum(2 for layer in layers for linear in _linears(layer) if linear.a is not None)
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


def _layer(layer: Any, number: int, config: Any, offset: float) -> Layer:
    at, mlp, name = layer.self_attn, layer.mlp, f"layers.{number}"
    is_fused = config.model_type == "phi3"
    qkv = ("qkv_proj",) if is_fused else ("q_proj", "k_proj", "v_proj")
    gate_up = ("gate_up_proj",) if is_fused else ("gate_proj", "up_proj")
    four = config.model_type == "gemma2"
    second = layer.pre_feedforward_layernorm if four else layer.post_attention_layernorm
    types = getattr(config, "layer_types", None)
    slides = types[number] == "sliding_attention" if types else getattr(config, "use_sliding_window", True)
    window = (getattr(config, "sliding_window", None) or 0) if slides else 0
    head_norm = None
    if hasattr(at, "q_norm"):
        head_norm = HeadNorm(at.q_norm.weight.data, at.k_norm.weight.data, at.q_norm.variance_epsilon)
    return Layer(
        _group(_linear(getattr(at, n), f"{name}.self_attn.{n}") for n in qkv),
        _linear(at.o_proj, f"{name}.self_attn.o_proj"),
        _group(_linear(getattr(mlp, n), f"{name}.mlp.{n}") for n in gate_up),
        _linear(mlp.down_proj, f"{name}.mlp.down_proj"),
        _norm(layer.input_layernorm, offset),
        _norm(second, offset),
        _norm(layer.post_attention_layernorm, offset) if four else None,
        _norm(layer.post_feedforward_layernorm, offset) if four else None,
        head_norm,
        window,
    )


def _norm(module: Any, offset: float) -> Norm:
    return Norm(module.weight.data, module.eps if hasattr(module, "eps") else module.variance_epsilon, offset)


def _group(linears: Iterable[Linear]) -> tuple[Linear, ...]:
    """Linears that share an input, and so one matrix."""
    found = tuple(linears)
    names = ", ".join(linear.name for linear in found)
    if len({getattr(linear.module.weight, "quant_state", None) is None for linear in found}) > 1:
        raise NotCoveredError(f"{names}: some in 4 bits and some not")
    if len({(len(linear.a), linear.scale, linear.dropout) for linear in found if linear.a is not None}) > 1:
        raise NotCoveredError(f"{names}: adapters of several ranks, scales or dropouts")
    return found


def _linear(module: Any, name: str) -> Linear:
    if not hasattr(module, "lora_A"):
        return Linear(name, _frozen(module, name))
    if module.active_adapters != ["default"] or module.merged or getattr(module, "use_dora", {}).get("default"):
        raise NotCoveredError(f"{name}: an adapter other than one plain LoRA")
    a, b = module.lora_A["default"], module.lora_B["default"]
    if a.bias is not None or b.bias is not None:
        raise NotCoveredError(f"{name}: an adapter with biases")
    dropout = getattr(module.lora_dropout["default"], "p", 0.0)
    return Linear(name, _frozen(module.base_layer, name), a.weight, b.weight, module.scaling["default"], dropout)


def _frozen(module: Any, name: str) -> Any:
    state = getattr(module.weight, "quant_state", None)
    if type(module) is not torch.nn.Linear and state is None:
        raise NotCoveredError(f"{name}: a layer of the kind {type(module).__name__}")
    if state is not None and (state.blocksize != 64 or module.in_features % 64):
        raise NotCoveredError(f"{name}: 4-bit weights in blocks that cross rows")
    return module
