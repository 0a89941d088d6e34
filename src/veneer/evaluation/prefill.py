"""Prompts are read in groups of like length, ahead of the slots that will answer them.

All but the last token of a prompt is read here; a slot begins with that one, so that all tokens are chosen at one
place, from logits of one shape. Padding stands behind each prompt, where causal attention does not see it. Groups are
made of all prompts, known ones among them, and in an order of their own, so that what a prompt is computed beside
depends neither on which answers are known nor on where it stands.
"""

from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache

from veneer.evaluation.prefix import SharedPrefix
from veneer.machine.ranks import Ranks
from veneer.planning.held_out import prompts_at_a_time


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
        rows: Rows that are answered at a time.
    """
    for group in _groups(prompts, rows):
        if all(number in known for number in group):
            continue
        cache: DynamicCache | None = _read(model, prefix, [prompts[n] for n in group])
        for row, number in enumerate(group):
            if number not in known:
                yield ReadPrompt(number, cache, row)
        cache = None  # one group is held at a time


def not_own(prompts: Sequence[list[int]], rows: int, ranks: Ranks) -> set[int]:
    """Return the numbers of the prompts that other ranks answer.

    A rank takes whole groups, or where there are few of them rows of each: then every rank reads all prompts, in the
    shapes in which one process would.
    """
    groups = list(_groups(prompts, rows))
    if len(groups) < 2 * ranks.size:
        groups = [[number] for group in groups for number in group]
    return {number for place, group in enumerate(groups) if place % ranks.size != ranks.rank for number in group}


def _groups(prompts: Sequence[list[int]], rows: int) -> Iterator[list[int]]:
    """Group the numbers of prompts by length: as many as may be read at a time, the longest of them being the last."""
    group: list[int] = []
    for number in sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), prompts[n])):
        if len(group) >= prompts_at_a_time(rows, len(prompts[number])):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _read(model: Any, prefix: SharedPrefix, prompts: Sequence[list[int]]) -> DynamicCache:
    own = [prompt[prefix.length : -1] for prompt in prompts]
    width = max(1, *map(len, own))  # the model reads a token at least
    device = model.get_input_embeddings().weight.device
    ids_BL = torch.tensor([ids + [0] * (width - len(ids)) for ids in own], device=device)
    cache = prefix.repeated(len(prompts)).get("past_key_values") or DynamicCache(config=model.config.get_text_config())
    model(input_ids=ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
