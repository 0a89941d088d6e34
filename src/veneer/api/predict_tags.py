"""Finds entities in texts, or gives each word its tag, with a token classifier that was trained."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from veneer.config.notify import notify
from veneer.data.conversation import BadRowError
from veneer.data.tagged import OUTSIDE, WORDS, is_entity_tag, word_spans, words_of
from veneer.data.tagging import TaggedRenderer, Words
from veneer.engine.token_classifier import TokenClassifierEngine
from veneer.evaluation.entities import find_entities
from veneer.machine.batching import Batching

SORTED = 64  # batches whose texts are sorted by length together
WORD = re.compile(r"\w+|[^\w\s]")  # of a plain text: letters and digits, or a single other character


@dataclass(frozen=True)
class FoundEntity:
    """An entity in a text.

    Attributes:
        type: its type, such as PER.
        text: its characters.
        start, end: its first character in the text, and the one behind its last.
        score: mean probability of its words' tags.
    """

    type: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class PredictedTags:
    """The tags of a row.

    Attributes:
        place: file and line of the row.
        text: the text; of a row of words, these with spaces between.
        words, tags, scores: the words, and the likeliest tag of each with its probability. Words that are cut off, or
            are no token of the tokenizer, have the tag O and the score 0.
        entities: the entities that the tags mark; none where tags mark no entities.
    """

    place: str
    text: str
    words: list[str]
    tags: list[str]
    scores: list[float]
    entities: list[FoundEntity]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def texts_with_words(row: Mapping[str, Any]) -> tuple[str, Words]:
    """Return the text of a row with the characters of its words: those that the row names, or those of its text.

    Raises:
        BadRowError: it has neither, or nothing is in it.
    """
    if any(row.get(name) is not None for name in WORDS):
        joined = " ".join(words_of(row))
        return joined, word_spans(joined)
    text = row.get("text")
    if not isinstance(text, str):
        raise BadRowError(f"neither `text` nor `tokens` (fields here: {', '.join(row)})")
    if not text.strip():
        raise BadRowError("`text` is empty")
    return text, [found.span() for found in WORD.finditer(text)]


def predict_tags(
    rows: Iterable[tuple[str, tuple[str, Words]]],
    renderer: TaggedRenderer,
    engine: TokenClassifierEngine,
    batching: Batching,
) -> Iterator[PredictedTags]:
    """Yield the tags of rows, in order; see `veneer.predict`."""
    rows, has_told, longest = iter(rows), False, renderer.settings.max_length
    while chosen := list(islice(rows, SORTED * batching.size)):
        aligned = renderer.align([text for _, (text, _) in chosen], [words for _, (_, words) in chosen])
        fitted = [renderer.fit(ids, firsts, longest) for ids, firsts in aligned]
        if not has_told and any(len(ids) < len(whole) for (ids, _), (whole, _) in zip(fitted, aligned)):
            has_told = True
            notify(f"texts are cut off at {longest} places, of tokens and of words", "info", "data.max_length")
        order = sorted(range(len(chosen)), key=lambda n: -len(fitted[n][0]))
        parts = batching.over(order, lambda some: engine.token_scores([torch.tensor(fitted[n][0]) for n in some]))  # noqa: B023
        logits = dict(zip(order, (one for part in parts for one in part), strict=True))
        for number, (place, (text, words)) in enumerate(chosen):
            kept = set(fitted[number][1])
            firsts = [first if first in kept else None for first in aligned[number][1]]
            yield _of_row(place, text, words, firsts, logits[number].double().softmax(1), renderer.labels)


def _of_row(
    place: str,
    text: str,
    words: Words,
    firsts: Sequence[int | None],
    probabilities_LC: torch.Tensor,
    labels: Sequence[str],
) -> PredictedTags:
    best = probabilities_LC.max(1)
    outside = OUTSIDE if OUTSIDE in labels else ""
    tags = [outside if first is None else labels[int(best.indices[first])] for first in firsts]
    scores = [0.0 if first is None else float(best.values[first]) for first in firsts]
    entities = []
    for entity in find_entities(tags) if all(map(is_entity_tag, labels)) else ():
        start, end = words[entity.start][0], words[entity.end - 1][1]
        score = sum(scores[entity.start : entity.end]) / (entity.end - entity.start)
        entities.append(FoundEntity(entity.type, text[start:end], start, end, score))
    return PredictedTags(place, text, [text[start:end] for start, end in words], tags, scores, entities)
