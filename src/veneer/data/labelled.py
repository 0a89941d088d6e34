"""Turns rows of classification into examples: the tokens of a text or a pair of texts, then the id of the label.

An example's last token is that id, and the only one that is trained. So a step's loss, the split, fingerprints and
batches are those of other runs; the engine of classifiers takes the id off again (engine/classifier.py). It takes one
place of `data.max_length`.

Tokens are those that the tokenizer gives for the texts, with what it puts around them ([CLS], [SEP], <s>).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np

from veneer.config import Data
from veneer.data.batch import Example
from veneer.data.conversation import BadRowError, Conversation
from veneer.data.formats import with_our_names
from veneer.data.labels import id_of, label_of, names_of_labels
from veneer.data.render import MakeRenderer, Renderer
from veneer.data.row_parser import blocks_of, without
from veneer.data.sources.block import Unreadable
from veneer.data.sources.find import find_sources
from veneer.data.sources.read import parse
from veneer.data.tokens.encode import Encoder

Read = TypeVar("Read")
LONGEST_WORD = 100  # characters: a longer word is one unknown token for WordPiece, so texts have no limit by tokens


class LabelledRenderer(Renderer):
    """Turns texts with a label into tokens.

    Args:
        tokenizer: A fast Transformers tokenizer; it pads on the right from here on.
        data: The settings: max_length, overlong, special_tokens_in_text.
        labels: names of the labels, in the order of their ids.
    """

    row_format = "labelled"

    def __init__(self, tokenizer: Any, data: Data, labels: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "right"
        self.settings = data
        self.labels = tuple(labels)
        self.notes: Counter[str] = Counter()
        self.stop_ids: set[int] = set()
        self._template = None
        self._encoder = Encoder(tokenizer)

    @property
    def make(self) -> MakeRenderer:
        return partial(LabelledRenderer, labels=self.labels)

    def like(self, data: Data) -> "LabelledRenderer":
        """Return one of other settings."""
        found: LabelledRenderer = self.make(self.tokenizer, data)  # type: ignore[assignment]
        return found

    @property
    def fingerprint(self) -> str:
        """A hash of the tokenizer and the labels."""
        return hashlib.sha256("\n".join([self._encoder.fingerprint, *self.labels]).encode()).hexdigest()

    def overlong_characters(self, max_length: int) -> int:
        return LONGEST_WORD * self._encoder.longest_token * max_length

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[list[int]]:
        """Return the tokens of texts, or of pairs of texts, with nothing cut off but what `data.overlong` allows."""
        found: list[list[int]] = [[] for _ in texts]
        for size in (1, 2):
            numbers = [n for n, given in enumerate(texts) if len(given) == size]
            if not numbers:
                continue
            sides = [[texts[n][side] for n in numbers] for side in range(size)]
            encoded = self.tokenizer(
                *sides,
                truncation=self.settings.overlong == "truncate",
                max_length=self.settings.max_length - 1 if self.settings.overlong == "truncate" else None,
                split_special_tokens=self.settings.special_tokens_in_text != "control",
                return_attention_mask=False,
                verbose=False,
            )
            for number, ids in zip(numbers, encoded["input_ids"], strict=True):
                found[number] = ids
        return found

    def render(self, conversations: Sequence[Conversation]) -> list[list[Example] | BadRowError]:
        """Each row as one example, or what is wrong with its label."""
        encoded = self.encode([tuple(turn.content for turn in row.prompt()) for row in conversations])
        results: list[list[Example] | BadRowError] = []
        for row, ids in zip(conversations, encoded, strict=True):
            try:
                results.append([labelled_example(ids, id_of(row.reference(), self.labels), row.place)])
            except BadRowError as error:
                results.append(error)
        return results

    def pieces(self, example: Example) -> list[dict[str, Any]]:
        """An example's text, and its label."""
        text = self.tokenizer.decode(example.ids[:-1].tolist())
        parts = ((text, 0.0), (self.labels[int(example.ids[-1])], 1.0))
        return [{"text": part, "weight": weight, "control": False} for part, weight in parts]


def labelled_example(ids: Sequence[int], label: int, place: str) -> Example:
    """Return tokens with the id of their label behind them, which is what is trained."""
    return Example(np.array([*ids, label], dtype=np.int32), ((len(ids), len(ids) + 1, 1.0),), place)


def scan_labels(data: Data) -> tuple[str, ...]:
    """Return the labels that training rows have; rows that cannot be read are told of when they are tokenized.

    Raises:
        UserError: there are no such files.
    """
    return names_of_labels(set(read_all(data, label_of)))


def read_all(data: Data, read: Callable[[Mapping[str, Any]], Read]) -> Iterator[Read]:
    """Yield what `read` gives for each training row, by our names; rows that it cannot read are left out.

    Raises:
        UserError: there are no such files.
    """
    for source in find_sources(data.train, "data.train", data.split, data.subset):
        for block in blocks_of(source, "data.train", data):
            for raw in block.rows:
                row = parse(raw)
                if isinstance(row, Unreadable):
                    continue
                with suppress(BadRowError):
                    yield read(with_our_names(without(row, data.ignore_columns), data.columns))
