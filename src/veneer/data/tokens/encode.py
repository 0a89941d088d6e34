"""Turns text into tokens with the position of each, with two guarantees that a tokenizer alone does not give.

A control token's string within a row's own text stays text. Before rendering, such a string is marked behind its first
character with one that no text holds; the tokenizer then reads the parts by themselves, so it never sees the string.

A border (where an answer begins or ends) is always a border of tokens. Where a token would reach across, or where the
tokens before it are not those that the text before it has by itself, the text is cut there and its parts
are tokenized apart. So the model is asked in training exactly as it is asked when it generates.
"""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from veneer.data.tokens.words import WordEncoder

# Noncharacters: Unicode keeps them for a program's own use, so no text should hold them.
MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
UNCUT = ""  # the mark of a text that has none
CACHED = 64  # characters; what stands before an answer is mostly the same few tokens


@dataclass(frozen=True, slots=True)
class Text:
    """Rendered text, to be tokenized.

    Attributes:
        text: rendered text with marks in it.
        borders: positions that must be borders of tokens, rising; they count the marks.
        mark: character that is a mark, or UNCUT.
    """

    text: str
    borders: tuple[int, ...]
    mark: str = UNCUT


class Encoder:
    """Tokenizes rendered text.

    Args:
        tokenizer: fast Transformers tokenizer; it is not changed.

    Attributes:
        control: ids of control tokens.
        fingerprint: hash of everything that decides the tokens of a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        # A copy, without what would add tokens or cut them, and with offsets that hold a token's leading space.
        description = tokenizer.backend_tokenizer.to_str()
        self.fingerprint = hashlib.sha256(description.encode()).hexdigest()
        self._backend = Tokenizer.from_str(description)
        self._backend.post_processor = None
        self._backend.no_padding()
        self._backend.no_truncation()
        self._words = WordEncoder.of(self._backend, description)
        special = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control = set(tokenizer.all_special_ids) | set(special)
        strings = {tokenizer.convert_ids_to_tokens(number) for number in self.control}
        self._strings = sorted((string for string in strings if len(string) > 1), key=len, reverse=True)
        self._heads = {string[:2] for string in self._strings}
        self._pattern = re.compile("|".join(map(re.escape, self._strings)))
        plain = [str(token) for token in special.values() if not (token.rstrip or token.lstrip)]
        self._anchor = plain[0] if plain else ""
        self._before: dict[str, list[int]] = {}
        vocabulary = tokenizer.get_vocab()
        self.longest_token = max((len(token) for token in vocabulary), default=1)

    def holds_control(self, text: str) -> bool:
        """Whether a text holds the string of a control token."""
        for head in self._heads:
            if head in text:
                return self._pattern.search(text) is not None
        return False

    def marked(self, text: str, mark: str) -> str:
        """The text with a mark in the middle of each string of a control token."""
        while self.holds_control(text):
            text = self._pattern.sub(lambda found: found[0][:1] + mark + found[0][1:], text)
        return text

    def control_ends(self, text: str) -> list[int]:
        """The ends of control tokens' strings in a rendered text."""
        return [found.end() for found in self._pattern.finditer(text)]

    def without_control(self, text: str) -> str:
        """A rendered text without the strings of control tokens."""
        return self._pattern.sub("", text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of plain texts; control strings become control tokens."""
        if self._words is not None:
            return self._words.encode(texts)
        return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]

    def encode_at(self, texts: Sequence[Text]) -> list[tuple[list[int], list[int]]]:
        """Tokens of texts without their marks, and for each border how many tokens stand before it."""
        if self._words is not None:
            return self._encode_parts(texts)
        encodings = self._backend.encode_batch([text.text for text in texts], add_special_tokens=False)
        results = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            at = None if text.mark else self._counts(text.text, ids, encoding.offsets, text.borders)
            results.append(self._encode_cut(text) if at is None else (ids, at))
        return results

    def _encode_parts(self, texts: Sequence[Text]) -> list[tuple[list[int], list[int]]]:
        """Encode every part by itself, where a part's tokens do not depend on the text before it."""
        parts: list[str] = []
        for text in texts:
            edges = (0, *text.borders, len(text.text))
            parts += [text.text[start:end] for start, end in pairwise(edges)]
        tokens = iter(self.encode(parts) if not any(t.mark for t in texts) else self._encode_marked(texts, parts))
        results = []
        for text in texts:
            ids = list(next(tokens))
            counts = []
            for _ in text.borders:
                counts.append(len(ids))
                ids += next(tokens)
            results.append((ids, counts))
        return results

    def _encode_marked(self, texts: Sequence[Text], parts: list[str]) -> list[list[int]]:
        """Tokens of parts, cut at their text's marks."""
        marks = [text.mark for text in texts for _ in range(len(text.borders) + 1)]
        pieces = [part.split(mark) if mark else [part] for part, mark in zip(parts, marks, strict=True)]
        tokens = iter(self.encode([piece for part in pieces for piece in part]))
        return [[token for _ in part for token in next(tokens)] for part in pieces]

    def _counts(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], places: Sequence[int]
    ) -> list[int] | None:
        """Tokens before each place; None if one is no border of tokens."""
        starts = [start for start, _ in offsets]
        counts = []
        for place in places:
            count = bisect_left(starts, place)
            if count and offsets[count - 1][1] > place:
                return None
            if count and ids[count - 1] not in self.control and not self._stands_alone(text, ids, starts, count, place):
                return None
            counts.append(count)
        return counts

    def _stands_alone(self, text: str, ids: list[int], starts: list[int], count: int, place: int) -> bool:
        """Whether the text before a place has the same tokens without what follows it.

        What stands before the last control token cannot be touched by what follows; it is left out.
        """
        first = count - 1
        while first and ids[first] not in self.control:
            first -= 1
        before = text[starts[first] if ids[first] in self.control else 0 : place]
        found = self._before.get(before)
        if found is None:
            found = self.encode([before])[0]
            if len(before) <= CACHED:
                self._before[before] = found
        return found == ids[first:count]

    def _encode_cut(self, text: Text) -> tuple[list[int], list[int]]:
        """Tokens with every border and every mark a border of tokens."""
        marks = {at for at, character in enumerate(text.text) if character == text.mark}
        ids: list[int] = []
        counts: dict[int, int] = {}
        start = 0
        for cut in sorted({*text.borders, *marks, len(text.text)}):
            if cut > start:
                part = text.text[start:cut]
                ids += self._continue(part) if start else self.encode([part])[0]
            counts[cut] = len(ids)
            start = cut + (cut in marks)
        return ids, [counts[border] for border in text.borders]

    def _continue(self, text: str) -> list[int]:
        """Tokens of a text that does not begin anything: some tokenizers put a space before what begins."""
        anchored, anchor = self.encode([self._anchor + text, self._anchor])
        return anchored[len(anchor) :]
