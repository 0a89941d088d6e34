"""The prefix that all prompts share (a system prompt, examples) is computed once instead of once a prompt.

Their keys and values are computed for one row and repeated for each batch. Generation then goes on behind them, as it
would behind any cache; each answer is that of ordinary generation but for rounding, since a product over other shapes
may add in another order. Padding stands between the shared tokens and each prompt's own, under the same mask as ever.

Only models whose cache is plain keys and values of all tokens are served: a sliding window or a recurrent state
depends on where padding stands. Others read each prompt whole.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

SHORTEST = 16  # tokens: sharing fewer is not worth a pass of its own


def shared_length(prompts: Sequence[list[int]]) -> int:
    """Count the tokens that all prompts begin with, leaving each at least one of its own; 0: not worth sharing."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in lexical order: what these two share, all share
    most = min(len(prompt) for prompt in prompts) - 1
    shared = next((n for n in range(most) if first[n] != last[n]), most)
    return shared if shared >= SHORTEST else 0


class SharedPrefix:
    """Keys and values of the tokens that prompts share.

    Args:
        model: A Transformers or PEFT model, in evaluation mode.
        prompts: Token ids of all prompts.

    Attributes:
        length: Tokens that are shared; 0: none, because they share too few or the model's cache cannot be shared.
    """

    @torch.no_grad()
    def __init__(self, model: Any, prompts: Sequence[list[int]]) -> None:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        self.length = shared_length(prompts)
        self._cache: Any = None
        if not self.length:
            return
        device = model.get_input_embeddings().weight.device
        ids_BL = torch.tensor([prompts[0][: self.length]], device=device)
        cache = getattr(model(input_ids=ids_BL, use_cache=True), "past_key_values", None)
        if isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
            self._cache = cache
        else:
            self.length = 0

    def repeated(self, rows: int) -> dict[str, Any]:
        """Return a new cache for a batch of so many rows, as keyword arguments of `generate`."""
        if self._cache is None:
            return {}
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return {"past_key_values": cache}


def padded(prompts: Sequence[list[int]], shared: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts to one length before each one's own tokens; ids and their mask are int64 [rows, longest].

    Args:
        prompts: Token ids.
        shared: Tokens that all begin with; padding stands behind them.
        pad: Token to pad with.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids_BL = torch.full((len(prompts), longest), pad)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        own = longest - len(prompt) + shared
        ids_BL[row, :shared], mask_BL[row, :shared] = torch.tensor(prompt[:shared], dtype=torch.int64), 1
        ids_BL[row, own:], mask_BL[row, own:] = torch.tensor(prompt[shared:]), 1
    return ids_BL, mask_BL
