"""Defines the formats of rows: the fields that mark each, and how a row of it becomes a conversation.

| format            | fields                                      | becomes                                          |
|-------------------|---------------------------------------------|--------------------------------------------------|
| messages          | messages: [{role, content}, ...], tools     | itself                                           |
| sharegpt          | conversations: [{from, value}, ...], tools  | the same turns; function_call is an answer       |
| alpaca            | instruction, input, output, history         | user: instruction, blank line, input; assistant  |
| prompt-completion | prompt, completion                          | user, assistant; plain text without a template   |
| question-answer   | question, answer, choices                   | user, assistant (`choices`: _with_choices)       |
| guanaco           | text: "### Human: ... ### Assistant: ..."   | the turns                                        |
| text              | text                                        | a document, learnt as a whole                    |
| preference        | chosen, rejected, prompt or conversations   | two conversations that part at the last answer   |
| rated             | completion, label, prompt                   | user, assistant, and whether it is good          |
| chosen            | those of preference (never recognised)      | the chosen side alone, to be learnt              |
| labelled          | text, text_pair, label (`model.task`)       | user, user; the label as the assistant's answer  |
| tagged            | tokens, ner_tags (`model.task`)             | user, assistant: words and tags between spaces   |
| text-pair         | anchor, positive, negative (`model.task`)   | user, and an answer for each other text          |

Beside these, chats have `system` and `tools`, and questions a `context`, which stands before the question, a blank line
between them. Columns that rows of conversations are known to have and that a format has no place for (CONTENT) are
refused, so that nothing is left out in silence; `data.ignore_columns` leaves them out by name.

Fields with other names are mapped by `data.columns`; `system`, `tools` and the like keep their names then. A new format
is a new entry in FORMATS; `recognise.py` chooses among them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from string import ascii_uppercase
from typing import Any

from veneer.config.run import ColumnName
from veneer.data.conversation import BadRowError, Conversation, Message
from veneer.data.labels import FIELDS, labelled
from veneer.data.tagged import FIELDS as TAGGED_FIELDS
from veneer.data.tagged import tagged
from veneer.data.text_pairs import FIELDS as PAIR_FIELDS
from veneer.data.text_pairs import text_pair
from veneer.data.turns import WORDS, listed, read_tools, read_turn, read_turns, text_of

Fields = Mapping[str, Any]
TURNS = ("messages", "conversations", "conversation")  # fields that hold a list of turns
LABELS = ("label", "kto_tag")  # whether an answer is good
OF_TASKS = ("labelled", "tagged", "text-pair")  # formats that `model.task` sets
EMPTY: tuple[Any, ...] = (None, "", [], {})
SHOWN = 12  # fields in a message
SYSTEM, TOOLS = ("system", "system_prompt"), ("tools", "functions")
CHAT = (*SYSTEM, *TOOLS)
ASKED = (*CHAT, "context")
# Columns that say something of a conversation. Those that a format does not read are refused.
CONTENT = (
    *(*ASKED, "contexts", "input", "history", "function_call", "tool_calls"),
    *("reasoning", "reasoning_content", "thinking", "image", "images", "audio", "audios", "video", "videos"),
    *("train", "trainable", "loss_weight"),
)
KEPT = (*TURNS, *LABELS, *CONTENT, "choices")  # keep their names where data.columns maps others
WHOLE = ("prompt", "completion", "messages", "text", "chosen", "rejected")  # names that make a format
MARKER = re.compile(r"### (Human|Assistant):")
# What is wrong with a pair of answers, which the ledger counts by itself.
SAME_ANSWERS = "`chosen` and `rejected` are the same"
OTHER_PROMPTS = "`chosen` and `rejected` answer different prompts"
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Format:
    """A shape of rows: the fields that mark it, whether a row has it, what it becomes, what it reads of CONTENT."""

    fields: str
    fits: Callable[[Fields], bool]
    convert: Callable[[Fields], Conversation]
    reads: tuple[str, ...] = ()


def to_conversation(row: Fields, name: str, columns: Mapping[ColumnName, str]) -> Conversation:
    """A row as a conversation.

    Raises:
        BadRowError: Fields are missing, hold what they should not, or would be left out.
    """
    if columns and (missing := [theirs for theirs in columns.values() if theirs not in row]):
        raise BadRowError(f"no column {names_of(missing)} (fields here: {names_of(row)})")
    row = with_our_names(row, columns)
    known = FORMATS[name]
    try:
        conversation = known.convert(row)
    except KeyError as error:
        raise BadRowError(
            f"missing `{error.args[0]}`; {name} needs {known.fields} (fields here: {names_of(row)})"
        ) from None
    _require_read(row, name)
    sides = [conversation.messages] + ([conversation.rejected] if conversation.rejected else [])
    for side in sides:
        _check(side)
    return conversation


def _require_read(row: Fields, name: str) -> None:
    """Raises BadRowError for what a row holds and its format would leave out."""
    reads = FORMATS[name].reads
    for column in CONTENT:
        if column in row and column not in reads and row[column] not in EMPTY:
            raise BadRowError(
                f"`{column}` would be left out: {name} has no place for it; write it into the turns or the text, "
                f"or set data.ignore_columns=[{column}]"
            )
    for label in LABELS if name not in ("rated", "labelled", "tagged") else ():
        value = row.get(label)
        # Of text to read on, a number is the class of a document as a rule.
        if _label(value) is False and not (name == "text" and str(value).strip() in ("0", "0.0")):
            raise BadRowError(
                f"`{label}` = {value!r}: an answer that was found bad would be learnt as a good one; leave such rows "
                f"out with data.bad_rows=drop, or set data.ignore_columns=[{label}] if it says something else"
            )


def _label(value: Any) -> bool | None:
    """Whether a label says good or bad: true or false, 1 or 0, or the same as text; None: it says neither."""
    if isinstance(value, str):
        value = WORDS.get(value.strip().lower(), {"1": 1, "0": 0}.get(value.strip()))
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def with_our_names(row: Fields, columns: Mapping[ColumnName, str]) -> Fields:
    """The row under our names. What is mapped makes the format; columns of KEPT that are not keep their names."""
    if not columns:
        return row
    keep = KEPT if any(name in columns for name in WHOLE) else row
    kept = {name: row[name] for name in keep if name in row and name not in columns.values()}
    return kept | {ours: row.get(theirs) for ours, theirs in columns.items()}


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
        row, choices = _with_choices(row, completion)
        given, answer = listed(row[prompt], prompt), listed(row[completion], completion)
        before = (_asked(row, prompt),) if given is None else _without_context(row, given, prompt)
        answers = (_answer(row, completion),) if answer is None else read_turns(answer)
        if not any(turn.role == "assistant" for turn in answers):
            raise BadRowError(f"no turn of the assistant in `{completion}`: nothing to learn")
        return Conversation(_system_before(row, before) + before + answers, tools=_tools(row), choices=choices)

    return convert


def _with_choices(row: Fields, field: str) -> tuple[Fields, tuple[str, ...]]:
    """The row with its right answer as text, and the possible answers of its column `choices`, for evaluation.

    The column is a list of texts, or `{"text": [...], "label": [...]}` as ARC has it. The answer is one of the texts,
    or the place of one, from 0; or a label, which stays the answer: then the labels are the choices. Without labels
    they are letters. Rows with other answers are read without their choices.

    Raises:
        BadRowError: There is no choice at that place.
    """
    answer, given = row.get(field), row.get("choices")
    parts = given if isinstance(given, dict) else {"text": given}
    choices, labels = _texts(parts.get("text")), _texts(parts.get("label"))
    if len(choices) < 2:
        return row, ()
    if len(labels) != len(choices):
        labels = tuple(ascii_uppercase[: len(choices)])
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise BadRowError(f"`{field}` = {answer}: `choices` has places 0 to {len(choices) - 1}")
        return {**row, field: choices[answer]}, choices
    return row, next((offered for offered in (choices, labels) if answer in offered), ())


def _texts(value: Any) -> tuple[str, ...]:
    """Return a list of texts; empty: it is none."""
    return tuple(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else ()


def _answer(row: Fields, field: str) -> Message:
    return Message("assistant", text_of(row, field, may_be_null=True))


def _asked(row: Fields, field: str) -> Message:
    """The question, below its context where it has one."""
    context = text_of(row, "context", may_be_null=True)
    question = text_of(row, field)
    return Message("user", f"{context}\n\n{question}" if context else question)


def _without_context(row: Fields, turns: list[Any], field: str) -> tuple[Message, ...]:
    """The turns of a prompt, which are read and not learnt."""
    if row.get("context"):
        raise BadRowError(
            f"`context` beside turns in `{field}`: write it into the turns, or set data.ignore_columns=[context]"
        )
    return tuple(replace(turn, weight=0.0) for turn in read_turns(turns))


def _tools(row: Fields) -> tuple[dict[str, Any], ...]:
    name = _only(row, TOOLS)
    return read_tools(row[name]) if name else ()


def _system(row: Fields) -> tuple[Message, ...]:
    name = _only(row, SYSTEM)
    return (Message("system", text_of(row, name)),) if name else ()


def _only(row: Fields, names: tuple[str, ...]) -> str | None:
    """The one of several names for a thing that a row has."""
    found = [name for name in names if row.get(name)]
    if len(found) > 1 and row[found[0]] != row[found[1]]:
        raise BadRowError(f"`{found[0]}` and `{found[1]}` differ; set data.ignore_columns to one of them")
    return found[0] if found else None


def _system_before(row: Fields, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The column `system` of a row, where its turns do not begin with the same."""
    system = _system(row)
    if not system or not messages or messages[0].role != "system":
        return system
    if messages[0].content != system[0].content:
        raise BadRowError(
            "`system` would be left out: the turns begin with another system prompt; set data.ignore_columns=[system]"
        )
    return ()


def _alpaca(row: Fields) -> Conversation:
    messages = list(_system(row))
    for turn in row.get("history") or ():
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadRowError("`history` must be a list of [question, answer]")
        for role, text in zip(("user", "assistant"), turn):
            messages.append(Message(role, text_of({"history": text}, "history")))
    asked, given = _asked(row, "instruction").content, text_of(row, "input", may_be_null=True)
    messages.append(Message("user", f"{asked}\n\n{given}" if given else asked))
    return Conversation((*messages, _answer(row, "output")), tools=_tools(row))


def _turns(row: Fields) -> Conversation:
    field = next((name for name in TURNS if name in row), "messages")
    if (turns := listed(row[field], field)) is None:
        raise BadRowError(f"`{field}` must be a list of turns")
    messages = read_turns(turns)
    return Conversation(_system_before(row, messages) + messages, tools=_tools(row))


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
        asked = next((side[0].role for side in (chosen, rejected) if side and side[0].role != "assistant"), None)
        if asked is not None and chosen and rejected:
            raise BadRowError(f"{OTHER_PROMPTS}: they differ from turn {shared + 1} on ({asked})")
    if chosen == rejected:
        raise BadRowError(SAME_ANSWERS)
    if not prompt:
        raise BadRowError("no prompt: neither a field `prompt` nor a common beginning of `chosen` and `rejected`")
    before = _system_before(row, prompt) + tuple(replace(turn, weight=0.0) for turn in prompt)
    return Conversation(before + chosen, tools=_tools(row), rejected=before + rejected)


def _side(row: Fields, field: str) -> tuple[Message, ...]:
    value = row[field]
    if (turns := listed(value, field)) is not None:
        return read_turns(turns)
    if isinstance(value, dict):
        return (read_turn(value, 1),)
    text = text_of(row, field)
    return _marked(text, TRANSCRIPT) if TRANSCRIPT.match(text) else (Message("assistant", text),)


def _prompt(row: Fields) -> tuple[Message, ...]:
    field = next((name for name in ("prompt", *TURNS) if row.get(name)), None)
    if field is None:
        if row.get("context"):
            raise BadRowError("`context` without a `prompt`: write it into the turns, or data.ignore_columns=[context]")
        return ()
    turns = listed(row[field], field)
    return (_asked(row, field),) if turns is None else _without_context(row, turns, field)


def _chosen(row: Fields) -> Conversation:
    return replace(_preference(row), rejected=())


def _rated(row: Fields) -> Conversation:
    field = next((name for name in LABELS if name in row), "label")
    if (label := _label(row[field])) is None:
        raise BadRowError(f"`{field}` must be true or false, this is {row[field]!r}")
    return replace(_pair("prompt", "completion")(row), label=label)


def _has(*fields: str) -> Callable[[Fields], bool]:
    return lambda row: all(field in row for field in fields)


def _has_turns(style: str) -> Callable[[Fields], bool]:
    """Whether a list of turns is there, in the style of `role` or of `from`; its field tells where it is no list."""
    by_field = {"messages": "role", "conversations": "from", "conversation": "from"}

    def fits(row: Fields) -> bool:
        field = next((name for name in TURNS if name in row), None)
        if field is None or (_is_preference(row) and not isinstance(row["chosen"], list)):
            return False  # beside a single chosen answer they are its prompt
        try:
            turns = listed(row[field], field)
        except BadRowError:
            turns = None  # told of the row, once its format is known
        first = turns[0] if turns else None
        known = [key for key in ("role", "from") if isinstance(first, dict) and key in first]
        return (known[0] if known else by_field[field]) == style

    return fits


def _is_preference(row: Fields) -> bool:
    return "chosen" in row and "rejected" in row


def _is_rated(row: Fields) -> bool:
    return "prompt" in row and "completion" in row and any(_label(row.get(name)) is not None for name in LABELS)


FORMATS: dict[str, Format] = {
    "messages": Format("`messages` (turns with role and content)", _has_turns("role"), _turns, CHAT),
    "sharegpt": Format("`conversations` (turns with from and value)", _has_turns("from"), _turns, CHAT),
    "alpaca": Format("`instruction`, `output`", _has("instruction", "output"), _alpaca, (*ASKED, "input", "history")),
    "prompt-completion": Format(
        "`prompt`, `completion`", _has("prompt", "completion"), _pair("prompt", "completion"), ASKED
    ),
    "question-answer": Format("`question`, `answer`", _has("question", "answer"), _pair("question", "answer"), ASKED),
    "guanaco": Format(
        "`text` (### Human: ... ### Assistant: ...)",
        lambda row: isinstance(row.get("text"), str) and bool(MARKER.match(row["text"].lstrip())),
        _guanaco,
    ),
    "text": Format("`text`", _has("text"), _text),
    "preference": Format("`chosen`, `rejected`", _is_preference, _preference, ASKED),
    "rated": Format("`prompt`, `completion`, `label`", _is_rated, _rated, ASKED),
    "chosen": Format("`chosen`, `rejected`", lambda row: False, _chosen, ASKED),
    "labelled": Format(FIELDS, lambda row: False, labelled),
    "tagged": Format(TAGGED_FIELDS, lambda row: False, tagged),
    "text-pair": Format(PAIR_FIELDS, lambda row: False, text_pair),
}


def names_of(fields: Any) -> str:
    """The first of some fields, each no longer than a name is: files may have any number of any length."""
    names = [f"`{field}`" if len(str(field)) <= 60 else f"`{str(field)[:60]}...`" for field in islice(fields, SHOWN)]
    more = f" and {len(fields) - SHOWN:,} more" if len(fields) > SHOWN else ""
    return ", ".join(names) + more if names else "none"
