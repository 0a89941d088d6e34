"""Finds what a chat template leaves out of a row, by comparing its fields with the text that was rendered of it.

A template may trim a text, put it elsewhere, write it as JSON or break its lines anew; none of that is a loss. A loss
is a field whose text stands nowhere. Equal texts are found as often as they are said, so that a system turn that
is also a part of the question is missed where it is left out.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from veneer.data.conversation import Message


def left_out(messages: Sequence[Message], text: str) -> str:
    """The first field of some turns that a text does not hold, in words; nothing where it holds all.

    Args:
        messages: Turns, as the template was given them.
        text: text that it made of them.
    """
    said = [(part, name) for message in messages for part, name in _parts(message)]
    at = 0
    for part, _ in said:
        found = text.find(part, at)
        if found < 0:
            break
        at = found + len(part)
    else:
        return ""
    rest = _squeezed(text)
    for part, name in sorted(said, key=lambda pair: -len(pair[0])):
        form = next((form for form in _forms(part) if form in rest), None)
        if form is None:
            return name
        rest = rest.replace(form, "\0", 1)
    return ""


def names_left_out(tools: Sequence[dict[str, Any]], text: str) -> str:
    """The first tool whose name a text does not hold, in words."""
    names = (str(tool.get("function", tool).get("name", "")) for tool in tools)
    return next((f"the tool {name}" for name in names if name not in text), "")


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """Texts of a turn with what they are."""
    turn = "the answer" if message.role == "assistant" else f"the {message.role} turn"
    texts = [(message.reasoning, "the reasoning of the answer"), (message.content, turn)]
    for call in message.tool_calls:
        texts += [(text, "a call's name and arguments") for text in (call["name"], *strings_of(call["arguments"]))]
    for text, name in texts:
        if text.strip():
            yield text.strip(), name


def strings_of(value: Any) -> Iterator[str]:
    """All keys and texts within a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)


def _forms(text: str) -> tuple[str, ...]:
    """A text as templates write it, squeezed: as it is, or as JSON."""
    return tuple(map(_squeezed, (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])))


def _squeezed(text: str) -> str:
    """Without white space."""
    return "".join(text.split())
