"""Embeds texts with a model that was trained."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from veneer.config.notify import notify
from veneer.data.conversation import BadRowError
from veneer.data.text_pairs import ANCHORS
from veneer.data.texts import TextsRenderer
from veneer.engine.classifier import ClassifierEngine
from veneer.machine.batching import Batching

SORTED = 64  # batches whose texts are sorted by length together
TEXTS = ("text", *ANCHORS)


@dataclass(frozen=True)
class EmbeddedText:
    """The embedding of a row's text.

    Attributes:
        place: file and line of the row.
        embedding: its numbers, of length 1 together.
    """

    place: str
    embedding: list[float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def texts_to_embed(row: Mapping[str, Any]) -> str:
    """Return the text of a row: `text`, or else what training's rows call the anchor.

    Raises:
        BadRowError: it has none, or nothing is in it.
    """
    name = next((name for name in TEXTS if row.get(name) is not None), None)
    if name is None or not isinstance(row[name], str):
        raise BadRowError(f"no text in any of {', '.join(TEXTS)} (fields here: {', '.join(row)})")
    if not row[name].strip():
        raise BadRowError(f"`{name}` is empty")
    return str(row[name])


def embed_texts(
    rows: Iterable[tuple[str, str]], renderer: TextsRenderer, engine: ClassifierEngine, batching: Batching
) -> Iterator[EmbeddedText]:
    """Yield the embeddings of rows, in order; see `veneer.predict`."""
    rows, has_told, longest = iter(rows), False, renderer.settings.max_length - 1
    while chosen := list(islice(rows, SORTED * batching.size)):
        encoded = renderer.encode([(text,) for _, text in chosen])
        if not has_told and any(len(ids) >= longest for ids in encoded):
            has_told = True
            notify(f"texts are cut off at {longest} tokens", "info", "data.max_length")
        order = sorted(range(len(encoded)), key=lambda n: -len(encoded[n]))
        parts = batching.over(order, lambda some: engine.scores([torch.tensor(encoded[n]) for n in some]))  # noqa: B023
        found_BD = torch.cat(list(parts))[torch.tensor(order).argsort()]
        for (place, _), embedding_D in zip(chosen, found_BD, strict=True):
            yield EmbeddedText(place, embedding_D.tolist())
