"""A model's shapes without its weights: built on torch's meta device from its configuration.

Any architecture of Transformers, since its own code builds it.
"""

from typing import Any

import torch

from veneer.plan.memory import Shapes


def build(config: Any, dtype: torch.dtype, depth: int | None = None) -> Any:
    """The base model on the meta device, with its own or another number of layers."""
    from transformers import AutoModelForCausalLM

    if depth is not None:
        config = type(config).from_dict(config.to_dict())
        text = config.get_text_config()
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:depth]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base.config.use_cache = False
    return base


def shapes_of(base: Any) -> Shapes:
    """The shapes of a model on the meta device."""
    from transformers.pytorch_utils import Conv1D

    config = base.config.get_text_config()
    linears, embeddings, head = {}, {}, None
    for path, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            linears[path] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            linears[path] = (module.weight.shape[0], module.weight.shape[1])
        elif isinstance(module, torch.nn.Embedding):
            embeddings[path] = (module.num_embeddings, module.embedding_dim)
        if module is base.get_output_embeddings():
            head = path
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shapes(
        architecture=type(base).__name__,
        weights={name: tuple(parameter.shape) for name, parameter in base.named_parameters()},
        other_bytes=sum(b.numel() * b.element_size() for b in base.buffers()),
        linears=linears,
        embeddings=embeddings,
        head=head,
        depth=config.num_hidden_layers,
        period=_period(base),
        key_value_bytes=2 * 2 * heads * width * config.num_hidden_layers,
        vocabulary=config.vocab_size,
        positions=getattr(config, "max_position_embeddings", None),
    )


def _period(base: Any) -> int | None:
    """After how many layers the decoder repeats itself; None where it does not, or does so too rarely to matter."""
    lists = [m for m in base.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = max(lists, key=len, default=[])
    config = base.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    if len(layers) != config.num_hidden_layers:
        return None
    signs = [
        (kind, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()))
        for kind, layer in zip(kinds, layers)
    ]
    for period in range(1, len(signs) // 4 + 1):
        if all(sign == signs[n % period] for n, sign in enumerate(signs)):
            return period
    return None
