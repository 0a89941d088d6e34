"""Reads turns as the world writes them: role / content or from / value, parts, tool calls, reasoning, weights."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from veneer.data.conversation import BadRowError, Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose text is a call
REASONING = ("reasoning_content", "reasoning", "thinking")
RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
WEIGHTS = ("loss_weight", "weight")  # ours, and OpenAI's


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
    if content_key not in turn and not turn.get("tool_calls"):
        raise BadRowError(f"turn {number} needs `{role_key}` and `{content_key}`")
    try:
        content = _content(turn, content_key, role)
        if said in CALLS:
            return Message(role, "", _weight(turn, role), tool_calls=_called(content))
        given = turn.get("tool_calls") or ()
        calls = tuple(_call(call) for call in given)
        reasoning = next((text_of(turn, key) for key in REASONING if turn.get(key)), "")
        name = text_of(turn, "name") if role == "tool" and turn.get("name") else ""
        return Message(role, content, _weight(turn, role), reasoning, calls, name, _ids(turn, given))
    except BadRowError as error:
        raise BadRowError(f"turn {number}: {error}") from None


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Definitions of tools: a list, or the same as JSON text; none where there is nothing."""
    if not value:
        return ()
    tools = _json(value, "tools") if isinstance(value, str) else value
    tools = tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError("`tools` must be a list of definitions, or one as JSON text")
    _require_json(tools, "tools")
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
    if "\0" in value:
        raise BadRowError(f"`{key}` holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"`{key}` holds half a character (a lone surrogate, as of a cut emoji)") from None
    return value


def _content(turn: dict[str, Any], key: str, role: str) -> str:
    parts = turn.get(key)
    if not isinstance(parts, list):
        return text_of(turn, key, may_be_null=role == "assistant" or bool(turn.get("tool_calls")))
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(text_of({"content": part}, "content"))
        elif isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text"):
            texts.append(text_of({"content": part.get("text")}, "content"))
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRowError(f"`{key}` has a part of the type {kind!r}; only text can be learnt")
    return "".join(texts)


def _weight(turn: dict[str, Any], role: str) -> float:
    key = next((key for key in WEIGHTS if turn.get(key) is not None), None)
    if key is None:
        return 1.0
    weight = turn[key]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise BadRowError(f"`{key}` must be a number of at least 0, this is {weight!r}")
    if role != "assistant" and weight:
        raise BadRowError(f"`{key}` = {weight} on a turn of the {role}; only answers have a weight")
    return float(weight)


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
    made = {"name": function["name"], "arguments": arguments}
    _require_json(made, "arguments")
    return made


def _ids(turn: dict[str, Any], calls: Any) -> tuple[str, ...]:
    """Ids of a turn's calls where all have one; of a tool turn that of the call it answers."""
    found = [call.get("id") for call in calls] if calls else [turn.get("tool_call_id")]
    _require_json(found, "id")
    return tuple(map(str, found)) if all(found) else ()


def _require_json(value: Any, what: str) -> None:
    """Raises BadRowError for what JSON text cannot hold: half characters, dates and bytes of a Parquet file, NaN."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadRowError(f"`{what}` holds half a character (a lone surrogate, as of a cut emoji)") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRowError(f"`{what}` holds what JSON cannot say: {error}") from None


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRowError(f"`{what}` is not JSON: {text[:40]!r}") from None
