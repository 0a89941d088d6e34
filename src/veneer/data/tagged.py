"""Reads rows of token classification: words, and a tag for each of them.

Rows have a list of words and a list of tags, by name or by id, or they are sentences of a CoNLL file: a word a line,
its tag in the last column. A row becomes a conversation: the words, a space between them, as the user's turn, and their
tags likewise as the answer. So words and tags are found again by splitting at spaces, and a word's characters in the
text are known; a space within a word becomes U+00A0.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from veneer.data.conversation import BadRowError, Conversation, Message

WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")
FIELDS = "`tokens` (or `words`) and `ner_tags` (or `tags`, `labels`), two lists of equal length; or a CoNLL file"
DOCUMENT = "-DOCSTART-"  # begins a document in CoNLL-2003's files, and is no word
OUTSIDE = "O"
TAG = re.compile(r"([BIESLU])-(\S+)")
NO_BREAK_SPACE = "\u00a0"


def tagged(row: Mapping[str, Any]) -> Conversation:
    """Return a row of words and tags; one of no words is empty.

    Raises:
        BadRowError: words or tags are missing, are no words or tags, or unequal in number.
    """
    words, tags = _sentence(row["conll"]) if "conll" in row else (words_of(row), _tags(row))
    if len(words) != len(tags):
        raise BadRowError(f"{len(words)} words and {len(tags)} tags: each word has one tag")
    return Conversation((Message("user", " ".join(words)), Message("assistant", " ".join(tags))))


def words_of(row: Mapping[str, Any]) -> list[str]:
    """Return the words of a row, with no space within them.

    Raises:
        BadRowError: it has none, or they are no texts.
    """
    name, words = _listed(row, WORDS)
    for number, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise BadRowError(f"`{name}`: word {number} is {'empty' if isinstance(word, str) else 'no text'}")
    return [re.sub(r"\s", NO_BREAK_SPACE, word.strip()) for word in words]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return the first character of each word of a row's text, and the one behind its last."""
    words = text.split(" ")
    ends = accumulate(len(word) + 1 for word in words)
    return [(end - 1 - len(word), end - 1) for word, end in zip(words, ends)]


def is_entity_tag(tag: str) -> bool:
    """Return whether a tag is O, or a prefix of IOB or BIOES and a type, such as B-PER."""
    return tag == OUTSIDE or TAG.fullmatch(tag) is not None


def count_orphans(rows: Iterable[Sequence[str]]) -> int:
    """Count tags that go on with an entity (I-, E-, L-) where none of their type stands before them."""
    count = 0
    for tags in rows:
        for before, tag in zip((OUTSIDE, *tags), tags):
            goes_on, began = tag[:2] in ("I-", "E-", "L-"), before[:2] in ("B-", "I-")
            count += goes_on and not (began and before[2:] == tag[2:])
    return count


def _tags(row: Mapping[str, Any]) -> list[str]:
    name, tags = _listed(row, TAGS)
    for number, tag in enumerate(tags, 1):
        is_id = isinstance(tag, int) and not isinstance(tag, bool)
        if not is_id and not (isinstance(tag, str) and tag.strip()):
            raise BadRowError(f"`{name}`: tag {number} is neither a name nor an id")
        if isinstance(tag, str) and re.search(r"\s", tag.strip()):
            raise BadRowError(f"`{name}`: tag {number} (`{tag[:60]}`) has a space within")
    return [str(tag).strip() for tag in tags]


def _listed(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, list[Any]]:
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        hint = "; files of CoNLL's columns end in .conll, .iob, .iob2 or .bio" if list(row) == ["text"] else ""
        raise BadRowError(f"none of the fields {', '.join(names)} (fields here: {', '.join(row)}){hint}")
    if not isinstance(row[name], list):
        raise BadRowError(f"`{name}` is no list, but {type(row[name]).__name__}")
    return name, row[name]


def _sentence(text: str) -> tuple[list[str], list[str]]:
    """Read a sentence of a CoNLL file: lines of columns, the word first and the tag last."""
    lines = [line.split("\t") if "\t" in line else line.split() for line in text.splitlines() if line.strip()]
    if lines[0][0] == DOCUMENT:
        return [], []
    for number, columns in enumerate(lines, 1):
        if len(columns) < 2 or not (columns[0].strip() and columns[-1].strip()):
            shown = " ".join(columns)[:60]
            raise BadRowError(f"line {number} of the sentence (`{shown}`) has no word and tag, or they are one column")
        if len(columns) != len(lines[0]):
            raise BadRowError(f"line {number} of the sentence has {len(columns)} columns, the first {len(lines[0])}")
    return [re.sub(r"\s", NO_BREAK_SPACE, columns[0].strip()) for columns in lines], [
        columns[-1].strip() for columns in lines
    ]
