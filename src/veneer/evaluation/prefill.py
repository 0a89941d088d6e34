"""Prompts are read in groups of like length, ahead of the slots that will answer them.

All but the last token of a prompt is read here; a slot begins with that one, so that all tokens are chosen at one
place, from logits of one shape. Padding stands behind each prompt, where causal attention does not see it. Groups are
made of all prompts, known ones among them, so that what a prompt is computed beside does not depend on which answers
are known.
"""

from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache

from veneer.evaluation.prefix import SharedPrefix
from veneer.planning.held_out import PREFILL_ROWS


class ReadPrompt(NamedTuple):
    """A prompt that has been read: its number, and the row of a cache that holds it."""

    number: int
    cache: DynamicCache
    row: int


def read_prompts(
    model: Any, prefix: SharedPrefix, prompts: Sequence[list[int]], known: Container[int], rows: int
) -> Iterator[ReadPrompt]:
    """Read prompts, the shortest first.

    Args:
        model: A Transformers or PEFT model, in evaluation mode.
        prefix: Keys and values of what all prompts begin with.
        prompts: Token ids.
        known: Numbers of the prompts that need not be answered.
        rows: Most prompts in a group.
    """
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    rows = min(rows, PREFILL_ROWS)
    for start in range(0, len(order), rows):
        group = order[start : start + rows]
        if all(number in known for number in group):
            continue
        cache: DynamicCache | None = _read(model, prefix, [prompts[n] for n in group])
        for row, number in enumerate(group):
            if number not in known:
                yield ReadPrompt(number, cache, row)
        cache = None  # one group is held at a time


def _read(model: Any, prefix: SharedPrefix, prompts: Sequence[list[int]]) -> DynamicCache:
    own = [prompt[prefix.length : -1] for prompt in prompts]
    width = max(1, *map(len, own))  # the model reads a token at least
    device = model.get_input_embeddings().weight.device
    ids_BL = torch.tensor([ids + [0] * (width - len(ids)) for ids in own], device=device)
    cache = prefix.repeated(len(prompts)).get("past_key_values") or DynamicCache(config=model.config.get_text_config())
    model(input_ids=ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
