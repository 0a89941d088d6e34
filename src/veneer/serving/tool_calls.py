"""Calls of tools, in the form in which a model's own template writes them.

A trial conversation with a call is rendered with the template; what stands around the call's JSON object is how this
model says that it calls (`<tool_call>` and `</tool_call>` in Hermes' and Qwen's form, nothing in Llama 3's). An answer
is searched for the same form. A template that writes calls in no JSON object at all is not read: its calls stay text.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from veneer.config import UserError
from veneer.data.conversation import Conversation, Message
from veneer.data.render import Renderer

NAME, KEY = "zq_call", "zq_key"
TOOL = {"type": "function", "function": {"name": NAME, "description": "a", "parameters": {"type": "object"}}}


class Call(NamedTuple):
    """A call: name of the tool, and its arguments as JSON text."""

    id: str
    name: str
    arguments: str


class CallForm(NamedTuple):
    """How a model writes a call: what stands before its JSON object and behind it; both may be empty."""

    begin: str
    end: str

    def starts(self, text: str) -> int:
        """Return where calls begin, or may begin once more text comes; the text's length: nowhere."""
        begin = self.begin
        if not begin:  # an object alone is a call only where it is the whole answer
            stripped = text.lstrip()
            return len(text) - len(stripped) if not stripped or stripped[0] in "{[" else len(text)
        at = text.find(begin)
        if at >= 0:
            return at
        held = max((size for size in range(1, len(begin)) if text.endswith(begin[:size])), default=0)
        return len(text) - held

    def read(self, text: str) -> tuple[str, list[Call]]:
        """Return an answer's text before its calls, and the calls; no calls where they are not whole."""
        at = self.starts(text)
        calls: list[Call] = []
        rest = text[at:].strip()
        while rest:
            rest = rest.removeprefix(self.begin).lstrip()
            try:
                value, size = json.JSONDecoder().raw_decode(rest)
            except (ValueError, RecursionError):
                return text, []
            found = [_call(one) for one in (value if isinstance(value, list) else [value])]
            if not all(found):
                return text, []
            calls += [call for call in found if call is not None]
            rest = rest[size:].lstrip().removeprefix(self.end).lstrip(" \n\r\t;,")
        return (text[:at].rstrip(), calls) if calls else (text, [])


def call_form(renderer: Renderer) -> CallForm | None:
    """Return how a model writes calls, by its template; None: in no JSON object."""
    if not renderer.is_chat:
        return None
    call = {"name": NAME, "arguments": {KEY: "a"}}
    turns = (Message("user", "a"), Message("assistant", "", tool_calls=(call,)))
    try:
        ids = renderer.answer_ids(Conversation(turns, "a trial", (TOOL,)))
    except UserError:
        return None
    text = str(renderer.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    start = text.find("{")
    if start < 0 or NAME not in text[start:]:
        return None
    try:
        _, size = json.JSONDecoder().raw_decode(text[start:])
    except ValueError:
        return None
    begin, end = text[:start].strip().removesuffix("["), text[start + size :].strip().removeprefix("]")
    return CallForm(begin.strip(), end.strip())


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments: Any = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(f"call_{secrets.token_hex(12)}", value["name"], arguments)


def as_dicts(calls: Sequence[Call], with_index: bool = False) -> list[dict[str, Any]]:
    """Return calls in OpenAI's form."""
    return [
        ({"index": number} if with_index else {})
        | {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for number, call in enumerate(calls)
    ]
