"""Reads rows of classification: a text or a pair of texts, and the name or the id of a label.

The names of columns are those of common data sets; `data.columns` maps others to `text`, `text_pair` and `label`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.config import UserError
from veneer.data.conversation import BadRowError, Conversation, Message
from veneer.data.turns import text_of

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
)
TEXTS = (*dict.fromkeys(first for first, _ in PAIRS), "sentence", "review", "content")
LABEL = ("label", "labels", "category", "class", "sentiment", "intent")
FIELDS = "`text` (or `sentence`, ...) or two texts (`sentence1` and `sentence2`, ...), and `label` (or `category`, ...)"
LISTED = 6  # names in a message


def texts_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the text of a row, or its two texts.

    Raises:
        BadRowError: it has none, or one is empty or no text.
    """
    first, second = next((pair for pair in PAIRS if all(name in row for name in pair)), ("", ""))
    first = first or next((name for name in TEXTS if name in row), "text")
    texts = (text_of(row, first), *([text_of(row, second, may_be_null=True)] if second else ()))
    if not texts[0].strip():
        raise BadRowError(f"`{first}` is empty")
    return texts[:1] if len(texts) == 2 and not texts[1].strip() else texts


def label_of(row: Mapping[str, Any]) -> str:
    """Return the label of a row as it is written there: a name, or an id.

    Raises:
        BadRowError: it has none, or several.
    """
    named = {name: row[name] for name in LABEL if row.get(name) not in (None, "", [])}
    if not named:
        raise BadRowError(f"no label: none of {', '.join(LABEL)} says anything")
    name, value = next(iter(named.items()))
    others = [other for other, theirs in named.items() if theirs != value]
    if others:
        raise BadRowError(f"`{name}` and `{others[0]}` differ; set data.ignore_columns to one of them")
    if isinstance(value, list):
        if len(value) != 1:
            raise BadRowError(f"`{name}` names {len(value)} labels: a row has one")
        value = value[0]
    if isinstance(value, float):
        if value != int(value):
            raise BadRowError(f"`{name}` = {value}: a number that is no id of a label (regression is not trained)")
        value = int(value)
    if not isinstance(value, str | int):
        raise BadRowError(f"`{name}` must be a name or an id, this is {type(value).__name__}")
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def labelled(row: Mapping[str, Any]) -> Conversation:
    """Return a row of classification: its texts as turns of the user, its label as the answer."""
    asked = tuple(Message("user", text) for text in texts_of(row))
    return Conversation((*asked, Message("assistant", label_of(row))))


def names_of_labels(found: Iterable[str]) -> tuple[str, ...]:
    """Return the labels of rows in the order of their ids: by number where all are numbers, else by name."""
    names = set(found)
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else str))


def id_of(label: str, labels: Sequence[str]) -> int:
    """Return the id of a label that a row names by its name or its id.

    Raises:
        BadRowError: there is no such label.
    """
    if label in labels:
        return labels.index(label)
    if label.isdecimal() and int(label) < len(labels):
        return int(label)
    shown = ", ".join(labels[:LISTED]) + (", ..." if len(labels) > LISTED else "")
    raise BadRowError(f"the label `{label[:60]}` is none of {len(labels)} ({shown})")


def require_classes(counts: Counter[int], labels: Sequence[str], setting: str, share: object) -> None:
    """Raise UserError for training rows that do not have two labels, or lack one of them altogether.

    Args:
        counts: number of rows, by the id of their label.
        labels: names of the labels.
        setting: value of `data.train`, for messages.
        share: value of `data.validation`.
    """
    if len(counts) == 1:
        (only,) = counts
        raise UserError(
            f"data.train = {setting}: all rows have one label, `{labels[only]}`: there is nothing to tell apart",
            "name rows of at least two labels",
        )
    if missing := [name for number, name in enumerate(labels) if not counts[number]]:
        raise UserError(
            f"data.train = {setting}: no training row has the label `{missing[0]}`"
            + (f", nor {len(missing) - 1} others" if len(missing) > 1 else ""),
            f"add such rows, lower data.validation ({share}), or leave the label out of data.labels",
        )
