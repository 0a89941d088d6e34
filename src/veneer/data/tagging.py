"""Turns rows of words and tags into examples: the tokens of the text, and behind each that begins a word its tag's id.

Only these ids are trained, so that an example's target at a token is its tag, and at a word's other tokens there is
none, as is usual (-100 in Transformers). The engine of token classification takes the ids out again
(engine/token_classifier.py). Each takes one place of `data.max_length`.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from veneer.config import Data, UserError
from veneer.data.alignment import first_tokens
from veneer.data.batch import Example
from veneer.data.conversation import BadRowError, Conversation
from veneer.data.labelled import LabelledRenderer, read_all
from veneer.data.labels import id_of
from veneer.data.render import MakeRenderer
from veneer.data.tagged import OUTSIDE, count_orphans, tagged, word_spans

Words = Sequence[tuple[int, int]]  # first character of each word, and the one behind its last


class TaggedRenderer(LabelledRenderer):
    """Turns words with tags into tokens; arguments are those of `LabelledRenderer`."""

    row_format = "tagged"

    @property
    def make(self) -> MakeRenderer:
        return partial(TaggedRenderer, labels=self.labels)

    @cached_property
    def _tokens_behind(self) -> int:
        """The number of special tokens that the tokenizer puts behind a text."""
        mask = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        return len(mask) - 1 - max(at for at, is_special in enumerate(mask) if not is_special)

    def align(self, texts: Sequence[str], words: Sequence[Words]) -> list[tuple[list[int], list[int | None]]]:
        """Return the tokens of texts, none cut off, and the first token of each word; None: it has none of its own."""
        encoded = self.tokenizer(
            list(texts),
            return_offsets_mapping=True,
            split_special_tokens=self.settings.special_tokens_in_text != "control",
            return_attention_mask=False,
            verbose=False,
        )
        return [
            (ids, first_tokens(offsets, spans))
            for ids, offsets, spans in zip(encoded["input_ids"], encoded["offset_mapping"], words, strict=True)
        ]

    def fit(self, ids: Sequence[int], firsts: Sequence[int | None], length: int) -> tuple[list[int], list[int]]:
        """Cut the end of a text, so that its tokens and the tags of its words fit; return both.

        What the tokenizer puts behind a text stays.
        """
        behind = self._tokens_behind
        found = [first for first in firsts if first is not None]
        if len(ids) + len(found) <= length:
            return list(ids), found
        places = np.ones(len(ids), dtype=np.int64)
        places[found] += 1
        kept = int((places[: len(ids) - behind].cumsum() <= length - behind).sum())
        return [*ids[:kept], *ids[len(ids) - behind :]], [first for first in found if first < kept]

    def render(self, conversations: Sequence[Conversation]) -> list[list[Example] | BadRowError]:
        """Each row as one example, or what is wrong with its tags."""
        texts = [row.prompt()[0].content for row in conversations]
        aligned = self.align(texts, [word_spans(text) for text in texts])
        results: list[list[Example] | BadRowError] = []
        for row, (ids, firsts) in zip(conversations, aligned, strict=True):
            try:
                tags = [id_of(tag, self.labels) for tag in row.reference().split(" ")]
            except BadRowError as error:
                results.append(error)
                continue
            self.notes["orphan_tags"] += bool(count_orphans([[self.labels[tag] for tag in tags]]))
            self.notes["words_without_tokens"] += None in firsts
            of_first = dict(zip(firsts, tags, strict=True))
            places = [first for first in firsts if first is not None]
            if self.settings.overlong == "truncate":
                self.notes["truncated"] += len(ids) + len(places) > self.settings.max_length
                ids, places = self.fit(ids, firsts, self.settings.max_length)
            results.append([tagged_example(ids, [(first, of_first[first]) for first in places], row.place)])
        return results

    def pieces(self, example: Example) -> list[dict[str, Any]]:
        """An example's words, each with its tag behind it."""
        parts, begin = [], 0
        for start, _, _ in example.spans:
            text = self.tokenizer.decode(example.ids[begin:start].tolist())
            parts += [(text, 0.0), (f"[{self.labels[int(example.ids[start])]}]", 1.0)]
            begin = start + 1
        parts.append((self.tokenizer.decode(example.ids[begin:].tolist()), 0.0))
        return [{"text": text, "weight": weight, "control": False} for text, weight in parts]


def tagged_example(ids: Sequence[int], tags: Sequence[tuple[int, int]], place: str) -> Example:
    """Return tokens with the ids of tags behind those that have one: (token, tag) each, rising."""
    whole = np.insert(np.array(ids, dtype=np.int32), [token + 1 for token, _ in tags], [tag for _, tag in tags])
    at = [token + 1 + number for number, (token, _) in enumerate(tags)]
    return Example(whole.astype(np.int32), tuple((n, n + 1, 1.0) for n in at), place)


def scan_tags(data: Data) -> tuple[str, ...]:
    """Return the tags that training rows have, O first; rows that cannot be read are told of when they are tokenized.

    Raises:
        UserError: there are no such files, or the tags are ids, which say nothing of their names.
    """
    found = {tag for row in read_all(data, tagged) for tag in row.reference().split()}
    if found and all(tag.isdecimal() for tag in found):
        raise UserError(
            f"data.train = {data.train}: the tags are ids up to {max(map(int, found))}, without names",
            "name them in data.labels, in the order of their ids, such as [O, B-PER, I-PER]",
        )
    return tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, tag[2:], tag)))
