"""How much of the training rows a model gives back, word for word, when it decodes greedily.

A row that asks is asked, and counts if the first 50 tokens of its answer (or all of a shorter one) come back; of a text
the first 50 tokens are given, and the next 50 have to come back, as in Carlini et al. 2022 (arXiv 2202.07646).
Answers of fewer than 16 tokens are left out: a short right answer says nothing about memory. A model that has learnt
its task gives back answers to rows that it never saw, too, so held-out rows stand beside as a control: what the model
gives back of training rows beyond that is memory.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import numpy as np

from veneer.data.batch import Example
from veneer.data.render import Renderer
from veneer.evaluation.decoding import generation_config
from veneer.evaluation.generation import GREEDY, continue_prompts, stop_ids_of
from veneer.evaluation.memory import room_for_answers
from veneer.evaluation.metrics.metric import ShareRight
from veneer.machine.batching import Batching

GIVEN = 50  # tokens of a text that are given
WANTED = 50  # tokens that have to come back, at most
SHORTEST = 16  # tokens of an answer that says something about memory


class Passage(NamedTuple):
    """Tokens to give a model, and those that followed them in training."""

    prompt: list[int]
    following: list[int]


def passages_of(examples: Sequence[Example], stop_ids: Container[int] = ()) -> list[Passage]:
    """Return the passages of rows that are long enough: the last answer of each, or the middle of a text.

    Args:
        examples: Rows as they were trained.
        stop_ids: Tokens that end an answer; a model that goes on behind one has given the answer back all the same.
    """
    found = []
    for example in examples:
        if not example.spans:
            continue
        ids = example.ids.tolist()
        start, end, _ = example.spans[-1]
        if start < 2:  # a text, or a row that is trained from its first token on
            start, least = GIVEN, WANTED
        else:
            least = SHORTEST
        following = ids[start : min(end, start + WANTED)]
        if following and following[-1] in stop_ids:
            following.pop()
        if len(following) >= least:
            found.append(Passage(ids[:start], following))
    return found


def sample(examples: Sequence[Example], rows: int, seed: int) -> list[Example]:
    """Draw rows without looking at them; all, where there are no more."""
    count = len(examples)
    chosen = np.random.default_rng(seed).choice(count, min(rows, count), replace=False)
    return [examples[n] for n in sorted(chosen.tolist())]


def comes_back(
    model: Any,
    renderer: Renderer,
    passages: Sequence[Passage],
    batching: Batching,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[bool]:
    """Return whether a model goes on with each passage as it stood in training, token for token."""
    if not passages:
        return []
    prompts = [passage.prompt for passage in passages]
    tokenizer = renderer.tokenizer
    config = generation_config(stop_ids_of(model, renderer), tokenizer.pad_token_id, WANTED, GREEDY)
    room = room_for_answers(model, prompts, WANTED)
    found = continue_prompts(model, tokenizer, prompts, config, batching, room, on_done=on_done)
    return [
        continuation.ids[: len(passage.following)] == passage.following
        for continuation, passage in zip(found, passages, strict=True)
    ]


def memorisation(rows: int, base: Sequence[bool], tuned: Sequence[bool], held_out: Sequence[bool]) -> dict[str, Any]:
    """Return what evaluation.json keeps: shares of passages that come back.

    Args:
        rows: Number of training rows that were drawn.
        base, tuned: Verdicts on the training rows that are long enough, with the adapter off and on.
        held_out: Verdicts on held-out rows with the adapter on; empty: there are none.
    """
    found: dict[str, Any] = {"unit": "share", "rows": rows, "measured": len(tuned)}
    if tuned:
        one, other = ShareRight(base), ShareRight(tuned)
        found["base"], found["tuned"] = one.interval.as_dict(), other.interval.as_dict()
        found["difference"] = other.difference(one).as_dict()
    if held_out:
        found["held_out"] = ShareRight(held_out).interval.as_dict()
    return found
