"""Reads turns in the forms of public data: role / content or from / value, parts, tool calls, reasoning, flags."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from veneer.data.conversation import BadRowError, Message
from veneer.data.values import as_json, check_text

_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "function_call", "tool_call"),
    "tool": ("tool", "tool_response", "observation", "function", "function_response", "ipython"),
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}
CALLS = ("function_call", "tool_call")  # roles whose text is a call
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("loss_weight", "weight")  # ours, and OpenAI's: any number of at least 0
FLAGS = ("train", "training", "trainable", "loss")  # whether an answer is learnt: true or false
WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
# Fields of a turn that would change what is learnt and that cannot be honoured, with what to do instead.
UNREAD = {
    "mask": "some mask what is learnt and some what is not; write `train`: true or false",
    "masked": "write `train`: true or false",
    "loss_mask": "write `train`: true or false",
    "train_detail": "parts of an answer cannot be left out; write `train`: true or false",
    "training_detail": "parts of an answer cannot be left out; write `train`: true or false",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "only text can be learnt"),
}
LOOKS_LIKE_TURNS = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking")
CALL_PARTS = ("tool_call", "function_call")
RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


def read_turns(turns: list[Any]) -> tuple[Message, ...]:
    """All turns of a list.

    Raises:
        BadRowError: A turn is not readable; the message has its number.
    """
    return tuple(message for number, turn in enumerate(turns, 1) for message in _unwrapped(read_turn(turn, number)))


def _unwrapped(message: Message) -> list[Message]:
    """A tool turn that brings its `<tool_response>` without it, a turn for each: templates write their own."""
    text = message.content
    if message.role != "tool" or "<tool_response>" not in text or RESPONSE.sub("", text):
        return [message]
    return [replace(message, content=found[1]) for found in RESPONSE.finditer(text)]


def read_turn(turn: Any, number: int) -> Message:
    """One turn; `number` is for messages."""
    role_key, content_key = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    if not isinstance(turn, dict) or role_key not in turn:
        raise BadRowError(f"turn {number} needs `role` and `content`, or `from` and `value`")
    said = turn[role_key]
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise BadRowError(f"turn {number} has the role {said!r}; known roles: {', '.join(ROLES)}")
    if content_key not in turn and not (turn.get("tool_calls") or turn.get("function_call")):
        raise BadRowError(f"turn {number} needs `{role_key}` and `{content_key}`")
    try:
        _require_read(turn, role)
        content, reasoning, calls = _content(turn, content_key, role)
        if said in CALLS:
            return Message(role, "", _weight(turn, role), tool_calls=_called(content))
        reasoning = next((text_of(turn, key) for key in REASONING if turn.get(key)), reasoning)
        name = text_of(turn, "name") if role == "tool" and turn.get("name") else ""
        calls = _calls(turn) + calls
        return Message(
            role, content, _weight(turn, role), reasoning, calls, name, _ids(turn, turn.get("tool_calls") or ())
        )
    except BadRowError as error:
        raise BadRowError(f"turn {number}: {error}") from None


def listed(value: Any, field: str) -> list[Any] | None:
    """The turns that a field holds, as a list or (in CSV) as JSON text; None where it is neither.

    Raises:
        BadRowError: It is text that looks like turns and is no JSON.
    """
    if isinstance(value, str) and LOOKS_LIKE_TURNS.match(value):
        value = _json(value, field)
    return value if isinstance(value, list) else None


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Definitions of tools: a list, or the same as JSON text; none where there is nothing."""
    if not value:
        return ()
    tools = _json(value, "tools") if isinstance(value, str) else value
    tools = tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError("`tools` must be a list of definitions, or one as JSON text")
    tools = as_json(tools, "tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def text_of(row: Mapping[str, Any], key: str, may_be_null: bool = False) -> str:
    """A field's text. A null answer is an empty one, which is counted; a null question is a mistake.

    Raises:
        BadRowError: It is missing, no text, or text that cannot be right.
    """
    value = row.get(key) if may_be_null else row[key]
    if value is None and may_be_null:
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"`{key}` must be text, this is {'null' if value is None else type(value).__name__}")
    check_text(value, key)
    return value


def _require_read(turn: dict[str, Any], role: str) -> None:
    """Raises BadRowError for what a turn holds and no message could say."""
    for key, fix in UNREAD.items():
        if turn.get(key) not in (None, "", [], {}):
            raise BadRowError(f"`{key}` is not read: {fix}")
    if role != "assistant":
        for key in ("tool_calls", "function_call", *REASONING):
            if turn.get(key):
                raise BadRowError(f"`{key}` on a turn of the {role}; only answers have it")


def _content(turn: dict[str, Any], key: str, role: str) -> tuple[str, str, tuple[dict[str, Any], ...]]:
    """Text, reasoning and calls of a turn's content, which may be in parts: {type, text} or {type, value}."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        may_be_null = role == "assistant" or bool(turn.get("tool_calls"))
        return text_of(turn, key, may_be_null=may_be_null), "", ()
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text" if isinstance(part, str) else None
        said = _said(part, kind) if isinstance(part, dict) else part
        if kind in TEXT_PARTS:
            texts.append(text_of({key: said}, key))
        elif kind in REASONING_PARTS and role == "assistant":
            thoughts.append(text_of({key: said}, key))
        elif kind in CALL_PARTS and role == "assistant":
            calls += _called(said) if isinstance(said, str) else (_call(said),)
        else:
            kind = kind or type(part).__name__
            raise BadRowError(f"`{key}` has a part of the type {kind!r}; only text can be learnt")
    return "".join(texts), "".join(thoughts), tuple(calls)


def _said(part: dict[str, Any], kind: Any) -> Any:
    """The content of a part: under `value`, or under the name that its type has with others."""
    return next((part[name] for name in ("value", "text", kind) if part.get(name) is not None), None)


def _weight(turn: dict[str, Any], role: str) -> float:
    """The weight of a turn's tokens in the loss, from its weights and flags, which must agree."""
    found = {key: _factor(turn[key], key) for key in (*WEIGHTS, *FLAGS) if turn.get(key) is not None}
    if not found:
        return 1.0
    if len(set(found.values())) > 1:
        raise BadRowError("contradiction: " + ", ".join(f"`{key}` = {turn[key]!r}" for key in found))
    (key, weight), *_ = found.items()
    if role != "assistant" and weight:
        raise BadRowError(f"`{key}` = {turn[key]!r} on a turn of the {role}; only answers have a weight")
    return weight


def _factor(value: Any, key: str) -> float:
    factor: Any = value
    if isinstance(value, str):
        try:
            factor = WORDS.get(value.strip().lower()) if value.strip().lower() in WORDS else float(value)
        except ValueError:
            factor = None
    if not isinstance(factor, bool | int | float) or not 0 <= factor < float("inf"):
        raise BadRowError(f"`{key}` must be true, false or a number of at least 0, this is {value!r}")
    if key in FLAGS and factor not in (0, 1):
        raise BadRowError(f"`{key}` must be true or false, this is {value!r}; a weight is written `loss_weight`")
    return float(factor)


def _calls(turn: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The calls of an answer: `tool_calls`, or the one of OpenAI's older `function_call`."""
    calls, older = turn.get("tool_calls") or (), turn.get("function_call")
    if not isinstance(calls, list | tuple):
        raise BadRowError(f"`tool_calls` must be a list of calls, this is {str(calls)[:40]!r}")
    if not older:
        return tuple(_call(call) for call in calls)
    if calls:
        raise BadRowError("`tool_calls` and `function_call` both; write `tool_calls` alone")
    return _called(older) if isinstance(older, str) else (_call(older),)


def _called(text: str) -> tuple[dict[str, Any], ...]:
    """The calls that a function_call turn holds as JSON text."""
    calls = _json(text, "function_call")
    return tuple(_call(call) for call in (calls if isinstance(calls, list) else [calls]))


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError("a tool call needs `name` and `arguments`")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, "arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise BadRowError("a tool call's `arguments` must be an object, or one as JSON text")
    called: dict[str, Any] = as_json({"name": function["name"], "arguments": arguments}, "tool_calls")
    return called


def _ids(turn: dict[str, Any], calls: Any) -> tuple[str, ...]:
    """Ids of a turn's calls where all have one; of a tool turn that of the call it answers."""
    found = [call.get("id") for call in calls] if calls else [turn.get("tool_call_id")]
    found = as_json(found, "id")
    return tuple(map(str, found)) if all(found) else ()


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRowError(f"`{what}` is not JSON: {text[:40]!r}") from None
