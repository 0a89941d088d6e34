"""Tokenizes byte-level BPE text word by word, each word once: faster than whole texts, and the same tokens.

The tokenizers of GPT-2's, Llama 3's and Qwen's kind first split text by a pattern, and no token reaches across the
parts; the splitting is most of the work, and parts repeat. Here ASCII text is split by the same pattern in `re`, where
all engines agree what letters, digits and white space are, and each part is looked up. Other characters: a single
space between two characters that are not white space begins a part by each of these patterns, so text is cut there
into words, and words with such characters are left to the tokenizer itself. Tokenizers with any other pattern,
normalizer or flag are left alone.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
PATTERNS = (_GPT_2, _LLAMA_3, _LLAMA_3.replace("{1,3}", ""))  # GPT-2; Llama 3 and GPT-4; Qwen 2, 2.5 and 3
_SPACE = re.compile(r"(?<=\S) (?=\S)")
LONG = 64  # characters; longer words are not kept
MOST = 500_000  # words kept
# How byte-level tokenizers write the ASCII bytes that are no visible characters.
_BYTES = {byte: chr(256 + byte) for byte in range(33)} | {127: chr(256 + 33)}


class WordEncoder:
    """Tokenizes texts by their words.

    Args:
        backend: The tokenizer.
        parts: pattern of `re` by which it splits ASCII text.
    """

    def __init__(self, backend: Tokenizer, parts: str) -> None:
        self._backend = backend
        self._parts = re.compile(parts, re.ASCII)
        self._added = {token.content: [number] for number, token in backend.get_added_tokens_decoder().items()}
        by_length = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, by_length))})")
        self._heads = {string[:2] for string in by_length}
        self._known = dict(self._added)

    @classmethod
    def of(cls, backend: Tokenizer, description: str) -> "WordEncoder | None":
        """The encoder of a tokenizer whose texts' tokens are for sure those of their words; None of any other.

        Args:
            backend: The tokenizer.
            description: output of its `to_str`.
        """
        facts = json.loads(description)
        model, added = facts["model"], facts["added_tokens"]
        flags = ("lstrip", "rstrip", "single_word")
        parts = _ascii_pattern(facts["pre_tokenizer"])
        fits = (
            model["type"] == "BPE"
            and not model.get("dropout")
            and (facts["normalizer"] is None or facts["normalizer"] == {"type": "NFC"})
            and bool(added)
            and not any(token[flag] for token in added for flag in flags)
        )
        return cls(backend, parts) if fits and parts is not None else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text; strings of added tokens become those."""
        words = [self._words(text) for text in texts]
        if len(self._known) > MOST:
            self._known = dict(self._added)
        known = self._known
        new = set().union(*words).difference(known)
        self._learn(new)
        found = [list(chain.from_iterable(map(known.__getitem__, part))) for part in words]
        for word in new:
            if len(word) > LONG:
                del known[word]
        return found

    def _words(self, text: str) -> list[str]:
        if not any(head in text for head in self._heads):
            return self._split(text)
        words: list[str] = []
        for at, part in enumerate(self._pattern.split(text)):
            if at % 2:
                words.append(part)
            elif part:
                words += self._split(part)
        return words

    def _split(self, text: str) -> list[str]:
        """The parts of a text without added tokens; words with characters beyond ASCII stay whole."""
        if text.isascii():
            return self._parts.findall(text)
        if "\0" in text:
            return [text]
        words: list[str] = []
        for word in _SPACE.sub("\0 ", text).split("\0"):
            if word.isascii():
                words += self._parts.findall(word)
            else:
                words.append(word)
        return words

    def _learn(self, words: Iterable[str]) -> None:
        """Tokenize words that are new: parts of ASCII text by the model alone, others by the whole tokenizer."""
        others = []
        model = self._backend.model
        for word in words:
            if word.isascii() and "\0" not in word:
                self._known[word] = [token.id for token in model.tokenize(word.translate(_BYTES))]
            else:
                others.append(word)
        for word, encoding in zip(others, self._backend.encode_batch_fast(others, add_special_tokens=False)):
            self._known[word] = encoding.ids


def _ascii_pattern(facts: Any) -> str | None:
    """The pattern of `re` by which a pre-tokenizer splits ASCII text; None if it is not one of those that are known."""
    if facts is None:
        return None
    *before, last = facts["pretokenizers"] if facts["type"] == "Sequence" else [facts]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    kinds = [part["type"] for part in before]
    if last.get("use_regex", True):
        if kinds == []:
            pattern = _GPT_2
        elif kinds == ["Digits"] and before[0]["individual_digits"]:
            # Digits are cut out first, so white space before one ends its piece of text.
            pattern = _GPT_2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
        else:
            return None
    elif kinds == ["Split"] and before[0]["behavior"] == "Isolated" and not before[0]["invert"]:
        pattern = before[0]["pattern"].get("Regex")
        if pattern not in PATTERNS:
            return None
    else:
        return None
    letters = pattern.replace(r"[^\r\n\p{L}\p{N}]", r"[^\r\nA-Za-z0-9]").replace(r"\s\p{L}\p{N}", r"\sA-Za-z0-9")
    return str(letters.replace(r"[^\s\p{N}]", r"[^\s0-9]").replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]"))
