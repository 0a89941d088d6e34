"""Attention of one token a slot, on a GPU, which reads the slots' keys and values where they are.

Under a mask of each slot's own length torch's fused kernels do not take a single query: scaled dot-product attention
falls back to plain products there, of float32 copies of all keys and values. Here the query heads that share a key are
the rows of a product with it as it is stored; scores and softmax are in float32.

S slots, H query heads, K key heads, W positions that are read, D width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

NAME = "veneer_slots"


def slot_attention(
    module: Any,
    query_SH1D: torch.Tensor,
    key_SKWD: torch.Tensor,
    value_SKWD: torch.Tensor,
    mask_S11W: torch.Tensor,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention's output, [S, 1, H, D], as Transformers' attention functions do, and no weights.

    Args:
        module: Attention module, which is not read.
        query_SH1D, key_SKWD, value_SKWD: Query of each slot, and what its cache holds.
        mask_S11W: Added to the scores.
        scaling: Factor of the scores; None: one over the root of D.
    """
    S, H, _, D = query_SH1D.shape
    K, W = key_SKWD.shape[1:3]
    query, key, value = query_SH1D.reshape(S * K, H // K, D), key_SKWD.flatten(0, 1).mT, value_SKWD.flatten(0, 1)
    if query.is_cuda and query.dtype != torch.float32:
        scores = torch.bmm(query, key, out_dtype=torch.float32)
    else:
        scores = torch.bmm(query.float(), key.float())
    scores = scores.view(S, H, 1, W) * (D**-0.5 if scaling is None else scaling) + mask_S11W
    weights = scores.softmax(-1).to(value.dtype)
    return torch.bmm(weights.view(S * K, H // K, W), value).view(S, 1, H, D), None


AttentionInterface.register(NAME, slot_attention)


@contextmanager
def attends_slots(model: Any) -> Iterator[None]:
    """Within the context, a model on a GPU whose attention is torch's own computes it by `slot_attention`."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before != "sdpa" or model.get_input_embeddings().weight.device.type != "cuda":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
