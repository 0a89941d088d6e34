"""Reads rows of embeddings: a text, one that belongs to it, and, where the row has them, some that do not.

A row becomes a conversation: the anchor and the negatives as turns of the user, the positive text as the answer.
`data.columns` maps other names to `anchor`, `positive` and `negative`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.data.conversation import BadRowError, Conversation, Message

ANCHORS = ("anchor", "query", "question", "sentence1")
POSITIVES = ("positive", "document", "answer", "sentence2")
NEGATIVES = ("negative", "negatives")
SIMILARITIES = ("score", "similarity", "similarity_score")  # how much two texts belong together
FIELDS = (
    "`anchor` (or `query`, ...), `positive` (or `document`, ...), and perhaps `negative`, a text or a list of texts"
)


def text_pair(row: Mapping[str, Any]) -> Conversation:
    """Return the texts of a row as turns: the anchor, the negatives, the positive.

    Raises:
        BadRowError: a text is missing, empty or no text, or the same text is there twice.
    """
    for name in SIMILARITIES:
        if row.get(name) is not None:
            raise BadRowError(
                f"`{name}`: degrees of similarity are not learnt; keep the rows whose texts belong together, and set "
                f"data.ignore_columns=[{name}]"
            )
    anchor, positive = _text(row, ANCHORS), _text(row, POSITIVES)
    negatives = _negatives(row)
    if positive == anchor:
        raise BadRowError("both texts are the same: there is nothing to learn from them")
    if positive in negatives:
        raise BadRowError("the negative text is the positive one")
    asked = tuple(Message("user", text) for text in (anchor, *negatives))
    return Conversation((*asked, Message("assistant", positive)))


def _text(row: Mapping[str, Any], names: Sequence[str]) -> str:
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise BadRowError(f"none of the fields {', '.join(names)} (fields here: {', '.join(row)})")
    return _require_text(row[name], name)


def _negatives(row: Mapping[str, Any]) -> list[str]:
    name = next((name for name in NEGATIVES if row.get(name) not in (None, "", [])), None)
    given = row[name] if name is not None else []
    return [_require_text(text, str(name)) for text in (given if isinstance(given, list) else [given])]


def _require_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"`{name}` must be a text, this is {type(value).__name__}")
    if not value.strip():
        raise BadRowError(f"`{name}` is empty")
    return value
