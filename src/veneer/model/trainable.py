"""Refuses architectures on which an adapter cannot be trained, by configuration and modules alone.

These would train and be wrong: a model that sees the tokens that it is to predict, and one whose layers read weights
without the adapter on them.
"""

from typing import Any

from veneer.config import UserError

# Parameters that identify recurrent layers whose code or kernels read `layer.weight` of linear layers and never call
# these, so that an adapter there has no effect.
RECURRENT = (({"A_log", "D"}, "state-space (Mamba)"), ({"recurrent_param"}, "RG-LRU"), ({"time_decay"}, "RWKV"))
FIX = "name a model that writes text token by token, of attention layers, such as Llama, Mistral, Qwen or Gemma"


def require_trainable(base: Any, name: str) -> None:
    """Raise UserError for an architecture that cannot be trained correctly.

    Args:
        base: model on the meta device.
        name: value of `model.base`.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    config = base.config.get_text_config()
    kind = config.model_type
    if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise UserError(f"model.base = {name}: {kind} is half an encoder, which a causal model would do without", FIX)
    is_both = type(config) in MODEL_FOR_MASKED_LM_MAPPING and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    looks_ahead = getattr(config, "is_decoder", None) is False and (is_both or kind == "bert-generation")
    if looks_ahead or getattr(config, "causal", None) is False or getattr(config, "is_causal", None) is False:
        raise UserError(
            f"model.base = {name}: {kind} is an encoder: each token sees those behind it, so that it would be "
            "trained on answers that it reads",
            f"{FIX}; to classify texts with it, set model.task=sequence-classification",
        )
    for path, module in base.named_modules():
        held = {part for part, _ in module.named_parameters(recurse=False)}
        for parts, layers in RECURRENT:
            if parts <= held:
                raise UserError(
                    f"model.base = {name}: {kind} has {layers} layers ({path}), whose code reads weights past an "
                    "adapter on them: part of it would be trained without effect",
                    FIX,
                )
