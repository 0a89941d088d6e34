"""Recognises the shape of the rows and turns each into a conversation.

| format            | fields                                  | becomes                                            |
|-------------------|-----------------------------------------|----------------------------------------------------|
| messages          | messages: [{role, content}, ...]        | itself                                             |
| alpaca            | instruction, output, optionally input   | user: instruction, blank line, input; assistant    |
| prompt-completion | prompt, completion                      | user, assistant; or plain text where no template is |

A new format is a new entry in FORMATS: the fields that mark it, and a function from row to conversation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from veneer.config import UserError
from veneer.data.read import Row, raise_bad_rows

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str
    trained: bool = True  # of an answer: whether it is learnt, or only read


@dataclass(frozen=True)
class Conversation:
    """The turns of one row. `place` is where it stands in its file."""

    messages: tuple[Message, ...]
    place: str

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn: no answer, or a blank one."""
        answers = [m.content for m in self.messages if m.role == "assistant" and m.trained]
        return not answers or not all(answer.strip() for answer in answers)

    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last answer."""
        return self.messages[: self._last_answer()]

    def reference(self) -> str:
        """The last answer."""
        return self.messages[self._last_answer()].content

    def _last_answer(self) -> int:
        return max(n for n, message in enumerate(self.messages) if message.role == "assistant")


def recognise(rows: list[Row], wanted: str = "auto") -> tuple[str, str]:
    """The format of the rows and the reason, from the fields of the first row.

    Raises:
        UserError: No format, or more than one, fits.
    """
    if wanted != "auto":
        return wanted, "set by data.format"
    fields = rows[0].value
    fits = [name for name, (marks, _) in FORMATS.items() if all(mark in fields for mark in marks)]
    if len(fits) == 1:
        return fits[0], "the fields are " + ", ".join(f"`{mark}`" for mark in FORMATS[fits[0]][0])
    known = "; ".join(f"{name} ({', '.join(marks)})" for name, (marks, _) in FORMATS.items())
    found = ", ".join(f"`{field}`" for field in fields) or "none"
    if fits:
        raise UserError(
            f"{rows[0].place}: the fields {found} fit {len(fits)} formats: {', '.join(fits)}",
            f"set data.format to one of {', '.join(fits)}",
        )
    raise UserError(f"{rows[0].place}: the fields {found} fit no known format", f"known formats: {known}")


def to_conversations(rows: list[Row], name: str) -> list[Conversation]:
    """Every row as a conversation.

    Raises:
        UserError: Rows with missing or wrong fields, several at once.
    """
    marks, convert = FORMATS[name]
    conversations, bad = [], []
    for row in rows:
        missing = [mark for mark in marks if mark not in row.value]
        if missing:
            names = ", ".join(f"`{mark}`" for mark in missing)
            bad.append(f"{row.place}: missing {names} (fields here: {', '.join(row.value) or 'none'})")
            continue
        try:
            conversations.append(Conversation(convert(row.value), row.place))
        except _BadRowError as error:
            bad.append(f"{row.place}: {error}")
    fields = ", ".join(f"`{mark}`" for mark in marks)
    raise_bad_rows(bad, f"every row of the format {name} needs {fields}; mend the rows or set data.format")
    return conversations


class _BadRowError(Exception):
    pass


def _alpaca(row: dict[str, Any]) -> tuple[Message, ...]:
    instruction, given, output = _text(row, "instruction"), _text(row, "input", True), _text(row, "output", True)
    question = f"{instruction}\n\n{given}" if given else instruction
    return Message("user", question), Message("assistant", output)


def _prompt_completion(row: dict[str, Any]) -> tuple[Message, ...]:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        given = tuple(replace(turn, trained=False) for turn in _turns(row["prompt"]))
        return given + _require_answer(_turns(row["completion"]))
    return Message("user", _text(row, "prompt")), Message("assistant", _text(row, "completion", True))


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    if not isinstance(row["messages"], list):
        raise _BadRowError("`messages` must be a list of turns")
    return _require_answer(_turns(row["messages"]))


def _turns(turns: list[Any]) -> tuple[Message, ...]:
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise _BadRowError(f"turn {number} needs `role` and `content`")
        if turn["role"] not in ROLES:
            raise _BadRowError(f"turn {number} has the role {turn['role']!r}; known roles: {', '.join(ROLES)}")
        messages.append(Message(turn["role"], _text(turn, "content", turn["role"] == "assistant")))
    return tuple(messages)


def _require_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not any(message.role == "assistant" for message in messages):
        raise _BadRowError("no turn of the role assistant: nothing to learn")
    return messages


def _text(row: dict[str, Any], key: str, may_be_null: bool = False) -> str:
    """A field's text. A null answer is an empty one, which is counted; a null question is a mistake."""
    value = row.get(key)
    if value is None and may_be_null:
        return ""
    if not isinstance(value, str):
        raise _BadRowError(f"`{key}` must be text, this is {'null' if value is None else type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRowError(f"`{key}` holds half a character (a lone surrogate, as of a cut emoji)") from None
    return value


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[Message, ...]]]] = {
    "messages": (("messages",), _messages),
    "alpaca": (("instruction", "output"), _alpaca),
    "prompt-completion": (("prompt", "completion"), _prompt_completion),
}
