"""Computes a prefix that all rows of a micro-batch share (a system prompt, say) once, not once a row.

The shared tokens go through the model as one row, and each row's own tokens then attend to their keys and values, which
are repeated for the rows. Gradients flow back through the repetition and add up, so loss and gradients equal those of
whole rows up to rounding. No shared token is a trained one. Where rows share half of their tokens, half of the work
remains.

It is for models whose cache is plain keys and values of all tokens, without dropout (rows would share its mask) and
without gradient checkpointing (which keeps no cache); others compute whole rows. Whether a model gives the same hidden
states is not assumed but tested on a few tokens.
"""

from typing import Any

import torch

MIN_SHARED = 16  # tokens; fewer are not worth a pass of their own
PROBE = 24  # tokens of the rows that a model is tested on
TOLERANCE = 0.02  # largest relative difference of their hidden states: that of rounding to bfloat16, layer after layer


def shared_tokens(ids_BL: torch.Tensor, first_trained: int) -> int:
    """Return the length of the prefix that all rows share before the first trained position; 0: not worth sharing.

    Args:
        ids_BL: right-padded rows.
        first_trained: first position, of any row, that predicts a trained token.
    """
    if len(ids_BL) < 2:
        return 0
    most = min(first_trained, ids_BL.shape[1] - 1)
    same_L = (ids_BL[:, :most] == ids_BL[:1, :most]).all(dim=0)
    shared = int(same_L.long().cumprod(0).sum())
    return shared if shared >= MIN_SHARED else 0


def hidden_after_prefix(base: Any, ids_BL: torch.Tensor, shared: int) -> torch.Tensor:
    """Return the last hidden states of the rows' own tokens, shape (B, L - shared, D).

    Args:
        base: Transformers' model, with or without adapters in it.
        ids_BL: right-padded rows, which all begin with the same `shared` tokens.
        shared: length of the prefix, at least 1 and less than L.
    """
    cache = base.base_model(input_ids=ids_BL[:1, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids_BL))
    output = base.base_model(input_ids=ids_BL[:, shared:], past_key_values=cache, use_cache=True)
    hidden_BLD: torch.Tensor = output.last_hidden_state
    return hidden_BLD


@torch.no_grad()
def can_share(base: Any) -> bool:
    """Return whether rows of a model can share the computation of their first tokens.

    Args:
        base: Transformers' model in evaluation mode, with or without adapters in it.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    drops = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in base.modules())
    drops = drops or getattr(base.config.get_text_config(), "attention_dropout", 0.0) > 0
    if drops or any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        return False
    device = base.get_input_embeddings().weight.device
    ids_BL = torch.arange(2 * PROBE, device=device).reshape(2, PROBE) % base.get_input_embeddings().weight.shape[0]
    shared = PROBE // 2
    ids_BL[1, :shared] = ids_BL[0, :shared]
    output = base.base_model(input_ids=ids_BL, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    whole_BLD = output.last_hidden_state[:, shared:].float()
    difference = hidden_after_prefix(base, ids_BL, shared).float() - whole_BLD
    return bool(difference.norm() <= TOLERANCE * whole_BLD.norm())
