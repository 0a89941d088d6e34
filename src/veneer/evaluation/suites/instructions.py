"""Instruction following: demands on the form of an answer that a program can check.

An item's `checks` must all hold. Counts are ranges from the least to the most; case does not count in comparisons; any
of `-`, `*` and `•` is a bullet; a sentence ends with `.`, `!` or `?` behind a word and before white space or the end.
"""

import re
from collections.abc import Callable
from typing import Any

from veneer.evaluation.suites.suite import Item, Suite, final_text

_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*\d+[.)]\s+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"\w[\"')\]]*[.!?]+(?=[\"')\]]*(?:\s|$))")
_AROUND = " \n.!?,\"'*"


def _lines(text: str) -> int:
    return sum(1 for line in text.splitlines() if line.strip())


def _is_within(count: int, limits: list[int]) -> bool:
    return limits[0] <= count <= limits[1]


def _ends(text: str, wanted: str) -> bool:
    text = text.lower().rstrip()
    return text.rstrip("\"'*").endswith(wanted) or text.rstrip(_AROUND).endswith(wanted)


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "words": lambda text, limits: _is_within(len(text.split()), limits),
    "sentences": lambda text, limits: _is_within(len(_SENTENCE_END.findall(text)), limits),
    "commas": lambda text, limits: _is_within(text.count(","), limits),
    "lines": lambda text, count: _lines(text) == count,
    "bullets": lambda text, count: len(_BULLET.findall(text)) == count,
    "numbered": lambda text, count: len(_NUMBERED.findall(text)) == count,
    "paragraphs": lambda text, count: len([part for part in re.split(r"\n\s*\n", text) if part.strip()]) == count,
    "upper": lambda text, wanted: text.isupper() == wanted,
    "lower": lambda text, wanted: text.islower() == wanted,
    "includes": lambda text, words: all(word in text.lower() for word in words),
    "excludes": lambda text, words: not any(word in text.lower() for word in words),
    "starts": lambda text, wanted: text.lower().lstrip(_AROUND).startswith(wanted),
    "ends": _ends,
    "quoted": lambda text, wanted: (len(text) > 2 and text[0] in '"“' and text[-1] in '"”') == wanted,
    "one_of": lambda text, wanted: text.lower().strip(_AROUND) in wanted,
}


def is_right(item: Item, answer: str) -> bool:
    """Return whether an answer meets all demands."""
    text = final_text(answer)
    return bool(text) and all(CHECKS[name](text, wanted) for name, wanted in item["checks"].items())


SUITE = Suite(
    name="instructions",
    shows="whether demands on form are met: counts of words and lines, lists, letter case, words to use or to avoid",
    cannot_show="whether the content of such an answer is true, useful or well written",
    is_right=is_right,
    max_new_tokens=80,
)
