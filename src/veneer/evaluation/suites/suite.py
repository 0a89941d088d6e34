"""Defines a suite: items with a prompt each, and a program that says whether an answer is right."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

Item = Mapping[str, Any]  # a line of a suite's file: `prompt`, and what its checker needs
LEAST_ITEMS = 60


@dataclass(frozen=True)
class Suite:
    """A fixed set of items that any model can be asked, whatever it was trained for.

    Attributes:
        name: name on the command line, in evaluation.json and in gates; also of its file of items.
        shows: one sentence on what its score can show.
        cannot_show: one sentence on what it cannot.
        is_right: checker of an answer to an item.
        max_new_tokens: longest answer.
        by_choice: whether the answer is the likeliest of the item's `choices`; then nothing is generated.
    """

    name: str
    shows: str
    cannot_show: str
    is_right: Callable[[Item, str], bool]
    max_new_tokens: int = 0
    by_choice: bool = False

    @property
    def items(self) -> tuple[Item, ...]:
        return _items(self.name)


@cache
def _items(name: str) -> tuple[Item, ...]:
    """Read the items that lie beside the code."""
    text = resources.files("veneer.evaluation.suites").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def final_text(answer: str) -> str:
    """Return what follows the reasoning of an answer."""
    return answer.rpartition("</think>")[2].strip()


def parse_json(answer: str) -> Any:
    """Parse an answer that is JSON as a whole, alone or within one code fence.

    Raises:
        ValueError: There is text around it, or it is not JSON.
    """
    text = final_text(answer)
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text.partition("\n")[2].removesuffix("```")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_same_json(one: Any, other: Any) -> bool:
    """Return whether two values are equal as JSON: true is not 1, 3 is 3.0, and the order of keys does not count."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
