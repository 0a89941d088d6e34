"""Attention of one token a slot, on a GPU, which reads the slots' keys and values where they are.

Under a mask of each slot's own length torch's fused kernels do not take a single query: scaled dot-product attention
falls back to plain products there, of float32 copies of all keys and values. Where Triton compiles for the GPU, a
kernel lets each slot read its own keys and no more (kernels/decode_attention.py); what stands in the place of a mask is
each slot's position then. Elsewhere the query heads that share a key are the rows of a product with it as it is stored;
scores and softmax are in float32.

S slots, H query heads, K key heads, W positions that are read, D width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from veneer.evaluation.slot_cache import SlotView
from veneer.kernels.decode_attention import decode_attention
from veneer.kernels.launch import compiles

NAME = "veneer_slots"


def slot_attention(
    module: Any,
    query_SH1D: torch.Tensor,
    key_SKWD: torch.Tensor,
    value_SKWD: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention's output, [S, 1, H, D], as Transformers' attention functions do, and no weights.

    Args:
        module: Attention module, which is not read.
        query_SH1D, key_SKWD, value_SKWD: Query of each slot, and what its cache holds.
        mask: Result of `slot_mask`: numbers added to the scores, [S, 1, 1, W], or positions, int64 [S, 1, 1, 1].
        scaling: Factor of the scores; None: one over the root of D.
    """
    S, H, _, D = query_SH1D.shape
    K, W = key_SKWD.shape[1:3]
    scaling = D**-0.5 if scaling is None else scaling
    if mask.dtype == torch.int64:
        out_SHD = decode_attention(query_SH1D[:, :, 0], key_SKWD, value_SKWD, mask.flatten(), scaling)
        return out_SHD[:, None], None
    query, key, value = query_SH1D.reshape(S * K, H // K, D), key_SKWD.flatten(0, 1).mT, value_SKWD.flatten(0, 1)
    if query.is_cuda and query.dtype != torch.float32:
        scores = torch.bmm(query, key, out_dtype=torch.float32)
    else:
        scores = torch.bmm(query.float(), key.float())
    scores = scores.view(S, H, 1, W) * scaling + mask
    weights = scores.softmax(-1).to(value.dtype)
    return torch.bmm(weights.view(S * K, H // K, W), value).view(S, 1, H, value.shape[-1]), None


AttentionInterface.register(NAME, slot_attention)


def reads_own_keys(model: Any) -> bool:
    """Return whether each slot's attention reads as many keys as it has, whatever width the cache gives it."""
    config = model.config.get_text_config()
    is_own = config._attn_implementation in ("sdpa", NAME)
    return is_own and compiles(model.get_input_embeddings().weight.device)


def slot_mask(model: Any, view: SlotView, dtype: torch.dtype) -> torch.Tensor:
    """Return what a model gets as its attention mask for a token a slot."""
    return view.position_S[:, None, None, None] if reads_own_keys(model) else view.mask(dtype)


@contextmanager
def attends_slots(model: Any) -> Iterator[None]:
    """Within the context, a model on a GPU whose attention is torch's own computes it by `slot_attention`."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    on_gpu = reads_own_keys(model) or model.get_input_embeddings().weight.device.type == "cuda"
    if before != "sdpa" or not on_gpu:
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
