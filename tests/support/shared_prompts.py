"""Pairs of answers to one prompt, as batches whose prompts go through the model once or twice."""

from dataclasses import replace

import numpy as np

from veneer.data.batch import Batch, Example

Lengths = tuple[tuple[int, int, int], ...]
# Tokens of prompt, chosen and rejected answer: long and short prompts, an answer of one token, and a prompt of one
# token, which cannot be left out.
PAIRS: Lengths = ((29, 8, 3), (4, 21, 30), (12, 1, 9), (1, 6, 5))


def examples_of(pairs: Lengths = PAIRS, vocabulary: int = 384, seed: int = 1) -> list[Example]:
    """The chosen and the rejected document of each pair, with weights and a reference of their own."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt, *answers in pairs:
        begin = rng.integers(3, vocabulary, prompt)
        for answer in answers:
            ids = np.concatenate([begin, rng.integers(3, vocabulary, answer)]).astype(np.int32)
            spans = ((prompt, len(ids), float(rng.uniform(0.5, 1.5))),)
            found.append(Example(ids, spans, "", {"reference": float(-5 * rng.random())}))
    return found


def once(pairs: Lengths = PAIRS, seed: int = 1) -> Batch:
    """The batch of such pairs."""
    return Batch.of(examples_of(pairs, seed=seed), 2)


def twice(batch: Batch) -> Batch:
    """The same batch of whole documents."""
    return replace(batch, shared=())
