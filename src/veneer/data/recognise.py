"""Recognises the shape of the rows and turns each into a conversation.

| format            | fields                                      | becomes                                          |
|-------------------|---------------------------------------------|--------------------------------------------------|
| messages          | messages: [{role, content}, ...], tools     | itself                                           |
| sharegpt          | conversations: [{from, value}, ...], tools  | the same turns; function_call is an answer       |
| alpaca            | instruction, input, output, history         | user: instruction, blank line, input; assistant  |
| prompt-completion | prompt, completion                          | user, assistant; plain text without a template   |
| question-answer   | question, answer                            | user, assistant                                  |
| guanaco           | text: "### Human: ... ### Assistant: ..."   | the turns                                        |
| text              | text                                        | a document, learnt as a whole                    |
| preference        | chosen, rejected, prompt or conversations   | two conversations that part at the last answer   |
| rated             | completion, label, prompt                   | user, assistant, and whether it is good          |
| chosen            | those of preference (never recognised)      | the chosen side alone, to be learnt              |

Fields with other names are mapped by `data.columns`. A format is recognised by the fields of the first rows, and by
what they hold where fields do not tell. Of two formats that fit, one may be the fuller reading of the other (a
row with chosen, rejected and conversations is a preference, not a conversation); YIELDS has those. Any other two are
an error that lists both. A new format is a new entry in FORMATS.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from veneer.config import UserError
from veneer.config.run import ColumnName
from veneer.data.conversation import BadRowError, Conversation, Message
from veneer.data.turns import read_tools, read_turn, read_turns, text_of

Fields = Mapping[str, Any]
TURNS = ("messages", "conversations", "conversation")  # fields that hold a list of turns
MARKER = re.compile(r"### (Human|Assistant):")
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Format:
    """A shape of rows: the fields that mark it, whether a row has it, and what it becomes."""

    fields: str
    fits: Callable[[Fields], bool]
    convert: Callable[[Fields], Conversation]


def recognise(rows: Sequence[Fields], wanted: str, columns: Mapping[ColumnName, str], place: str) -> tuple[str, str]:
    """The format of the rows, and the reason.

    Args:
        rows: The first rows of a file.
        wanted: `data.format`.
        columns: `data.columns`: our name of a field to the file's.
        place: Of the first row, for messages.

    Raises:
        UserError: No format fits, or more than one.
    """
    if wanted != "auto":
        return wanted, "set by data.format"
    named = [_named(row, columns) for row in rows]
    fits = {name for name, known in FORMATS.items() if known.fits(named[0])}
    if "guanaco" in fits and not all(FORMATS["guanaco"].fits(row) for row in named):
        raise _ambiguous(place, named[0], ["guanaco", "text"])
    fits -= {weaker for stronger in fits for weaker in YIELDS.get(stronger, ())}
    if len(fits) > 1:
        raise _ambiguous(place, named[0], [name for name in FORMATS if name in fits])
    if fits:
        (name,) = fits
        return name, f"the fields {FORMATS[name].fields}" + (" by data.columns" if columns else "")
    known = "; ".join(f"{name} ({known.fields})" for name, known in FORMATS.items() if name != "chosen")
    hint = (
        "; is a header line missing?" if len(rows[0]) == 1 or any(len(field.split()) > 3 for field in rows[0]) else ""
    )
    raise UserError(
        f"{place}: the fields {_names(rows[0])} fit no known format{hint}",
        f"name the columns, as in data.columns={{prompt: ..., completion: ...}}; known formats: {known}",
    )


def to_conversation(row: Fields, name: str, columns: Mapping[ColumnName, str]) -> Conversation:
    """A row as a conversation.

    Raises:
        BadRowError: Fields are missing or hold what they should not.
    """
    if columns:
        if missing := [theirs for theirs in columns.values() if theirs not in row]:
            raise BadRowError(f"no column {_names(missing)} (fields here: {_names(row)})")
        row = _named(row, columns)
    known = FORMATS[name]
    try:
        conversation = known.convert(row)
    except KeyError as error:
        raise BadRowError(
            f"missing `{error.args[0]}`; {name} needs {known.fields} (fields here: {_names(row)})"
        ) from None
    sides = [conversation.messages] + ([conversation.rejected] if conversation.rejected else [])
    for side in sides:
        _check(side)
    return conversation


def _named(row: Fields, columns: Mapping[ColumnName, str]) -> Fields:
    """The row under our names."""
    return {ours: row.get(theirs) for ours, theirs in columns.items()} if columns else row


def _check(messages: tuple[Message, ...]) -> None:
    if not messages:
        raise BadRowError("a conversation without turns")
    if messages[0].role == "document":
        return
    if not any(message.role == "assistant" for message in messages):
        raise BadRowError("no turn of the assistant: nothing to learn")
    for number, (turn, following) in enumerate(pairwise(messages), 1):
        if turn.role == following.role == "assistant":
            raise BadRowError(f"turns {number} and {number + 1} are both the assistant's")


def _pair(prompt: str, completion: str) -> Callable[[Fields], Conversation]:
    """The reader of rows with one question and one answer, by the names of their fields."""

    def convert(row: Fields) -> Conversation:
        given, answer = row[prompt], row[completion]
        if isinstance(given, list):
            before = tuple(replace(turn, weight=0.0) for turn in read_turns(given))
            answers = read_turns(answer) if isinstance(answer, list) else (_answer(row, completion),)
            if not any(turn.role == "assistant" for turn in answers):
                raise BadRowError(f"no turn of the assistant in `{completion}`: nothing to learn")
            return Conversation(_system(row) + before + answers, tools=read_tools(row.get("tools")))
        return Conversation((*_system(row), Message("user", text_of(row, prompt)), _answer(row, completion)))

    return convert


def _answer(row: Fields, field: str) -> Message:
    return Message("assistant", text_of(row, field, may_be_null=True))


def _system(row: Fields) -> tuple[Message, ...]:
    return (Message("system", text_of(row, "system")),) if row.get("system") else ()


def _alpaca(row: Fields) -> Conversation:
    messages = list(_system(row))
    for turn in row.get("history") or ():
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadRowError("`history` must be a list of [question, answer]")
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    instruction, given = text_of(row, "instruction"), text_of(row, "input", may_be_null=True)
    messages.append(Message("user", f"{instruction}\n\n{given}" if given else instruction))
    return Conversation((*messages, _answer(row, "output")))


def _turns(row: Fields) -> Conversation:
    field = next((name for name in TURNS if name in row), "messages")
    if not isinstance(row[field], list):
        raise BadRowError(f"`{field}` must be a list of turns")
    messages = read_turns(row[field])
    if messages and messages[0].role == "system":
        return Conversation(messages, tools=read_tools(row.get("tools")))
    return Conversation(_system(row) + messages, tools=read_tools(row.get("tools")))


def _guanaco(row: Fields) -> Conversation:
    return Conversation(_marked(text_of(row, "text"), MARKER))


def _marked(text: str, marker: re.Pattern[str]) -> tuple[Message, ...]:
    """The turns of a text in which a marker with the speaker's name stands before each."""
    before, *parts = marker.split(text)
    if before.strip():
        raise BadRowError(f"the text begins before the first marker: {before.strip()[:40]!r}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2]))


def _text(row: Fields) -> Conversation:
    return Conversation((Message("document", text_of(row, "text")),))


def _preference(row: Fields) -> Conversation:
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    prompt = _prompt(row)
    if not prompt or (chosen and chosen[0].role in ("system", "user")):
        # Both sides are whole conversations: the prompt is what they begin with alike.
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if chosen == rejected:
        raise BadRowError("`chosen` and `rejected` are the same")
    if not prompt:
        raise BadRowError("no prompt: neither a field `prompt` nor a common beginning of `chosen` and `rejected`")
    before = _system(row) + tuple(replace(turn, weight=0.0) for turn in prompt)
    return Conversation(before + chosen, tools=read_tools(row.get("tools")), rejected=before + rejected)


def _side(row: Fields, field: str) -> tuple[Message, ...]:
    value = row[field]
    if isinstance(value, list):
        return read_turns(value)
    if isinstance(value, dict):
        return (read_turn(value, 1),)
    text = text_of(row, field)
    return _marked(text, TRANSCRIPT) if TRANSCRIPT.match(text) else (Message("assistant", text),)


def _prompt(row: Fields) -> tuple[Message, ...]:
    field = next((name for name in ("prompt", *TURNS) if row.get(name)), None)
    if field is None:
        return ()
    value = row[field]
    return read_turns(value) if isinstance(value, list) else (Message("user", text_of(row, field)),)


def _chosen(row: Fields) -> Conversation:
    return replace(_preference(row), rejected=())


def _rated(row: Fields) -> Conversation:
    label = row["label"]
    if label not in (True, False):
        raise BadRowError(f"`label` must be true or false, this is {label!r}")
    conversation = _pair("prompt", "completion")(row)
    return replace(conversation, label=bool(label))


def _has(*fields: str) -> Callable[[Fields], bool]:
    return lambda row: all(field in row for field in fields)


def _has_turns(style: str) -> Callable[[Fields], bool]:
    """Whether a list of turns is there, in the style of `role` or of `from`; its field tells where it is no list."""
    by_field = {"messages": "role", "conversations": "from", "conversation": "from"}

    def fits(row: Fields) -> bool:
        field = next((name for name in TURNS if name in row), None)
        if field is None or (_is_preference(row) and not isinstance(row["chosen"], list)):
            return False  # beside a single chosen answer they are its prompt
        first = row[field][0] if isinstance(row[field], list) and row[field] else None
        known = [key for key in ("role", "from") if isinstance(first, dict) and key in first]
        return (known[0] if known else by_field[field]) == style

    return fits


def _is_preference(row: Fields) -> bool:
    return "chosen" in row and "rejected" in row


def _is_rated(row: Fields) -> bool:
    return "prompt" in row and "completion" in row and row.get("label") in (True, False) and row["label"] is not None


FORMATS: dict[str, Format] = {
    "messages": Format("`messages` (turns with role and content)", _has_turns("role"), _turns),
    "sharegpt": Format("`conversations` (turns with from and value)", _has_turns("from"), _turns),
    "alpaca": Format("`instruction`, `output`", _has("instruction", "output"), _alpaca),
    "prompt-completion": Format("`prompt`, `completion`", _has("prompt", "completion"), _pair("prompt", "completion")),
    "question-answer": Format("`question`, `answer`", _has("question", "answer"), _pair("question", "answer")),
    "guanaco": Format(
        "`text` (### Human: ... ### Assistant: ...)",
        lambda row: isinstance(row.get("text"), str) and bool(MARKER.match(row["text"].lstrip())),
        _guanaco,
    ),
    "text": Format("`text`", _has("text"), _text),
    "preference": Format("`chosen`, `rejected`", _is_preference, _preference),
    "rated": Format("`prompt`, `completion`, `label`", _is_rated, _rated),
    "chosen": Format("`chosen`, `rejected`", lambda row: False, _chosen),
}
_CHATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "question-answer")
# Who gives way to whom: a plain text beside a structured reading of the same row is its rendering.
YIELDS: dict[str, tuple[str, ...]] = {
    **{name: ("text", "guanaco") for name in (*_CHATS, "preference")},
    "guanaco": ("text",),
    "rated": ("prompt-completion", "text", "guanaco"),
}


def _ambiguous(place: str, row: Fields, names: list[str]) -> UserError:
    return UserError(
        f"{place}: the fields {_names(row)} fit {len(names)} formats: {', '.join(names)}",
        f"set data.format to one of {', '.join(names)}",
    )


def _names(fields: Any) -> str:
    return ", ".join(f"`{field}`" for field in fields) or "none"
