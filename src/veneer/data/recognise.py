"""Recognises the format of a file by the fields of its first rows, and by what they hold where fields do not tell.

Of two formats that fit, one may be the fuller reading of the other (a row with chosen, rejected and conversations is a
preference, not a conversation); YIELDS has those. Any other two are an error that lists both.
"""

from collections.abc import Mapping, Sequence

from veneer.config import UserError
from veneer.config.run import ColumnName
from veneer.data.formats import FORMATS, OF_TASKS, Fields, names_of, with_our_names
from veneer.data.shapes import COLUMNS, hint_of, is_columns

_CHATS = ("messages", "sharegpt", "alpaca", "prompt-completion", "question-answer")
# Who gives way to whom: a plain text beside a structured reading of the same row is its rendering.
YIELDS: dict[str, tuple[str, ...]] = {
    **{name: ("text", "guanaco") for name in (*_CHATS, "preference")},
    "guanaco": ("text",),
    "rated": ("prompt-completion", "text", "guanaco"),
}


def recognise(rows: Sequence[Fields], wanted: str, columns: Mapping[ColumnName, str], place: str) -> tuple[str, str]:
    """The format of the rows, and the reason.

    Args:
        rows: first rows of a file.
        wanted: value of `data.format`.
        columns: value of `data.columns`: our name of a field to the file's.
        place: file and line of the first row, for messages.

    Raises:
        UserError: No format fits, or more than one.
    """
    if wanted != "auto":
        return wanted, "set by data.format"
    if is_columns(rows):
        raise UserError(f"{place}: the file is one object of columns ({names_of(rows[0])}), not of rows", COLUMNS)
    named = [with_our_names(row, columns) for row in rows]
    fits = {name for name, known in FORMATS.items() if known.fits(named[0])}
    if "guanaco" in fits and not all(FORMATS["guanaco"].fits(row) for row in named):
        raise _ambiguous(place, named[0], ["guanaco", "text"])
    fits -= {weaker for stronger in fits for weaker in YIELDS.get(stronger, ())}
    if len(fits) > 1:
        raise _ambiguous(place, named[0], [name for name in FORMATS if name in fits])
    if fits:
        (name,) = fits
        return name, f"the fields {FORMATS[name].fields}" + (" by data.columns" if columns else "")
    known = "; ".join(
        f"{name} ({known.fields})" for name, known in FORMATS.items() if name not in ("chosen", *OF_TASKS)
    )
    why, fix = hint_of(rows)
    raise UserError(
        f"{place}: the fields {names_of(rows[0])} fit no known format{why}",
        fix or f"name the columns, as in data.columns={{prompt: ..., completion: ...}}; known formats: {known}",
    )


def _ambiguous(place: str, row: Fields, names: list[str]) -> UserError:
    return UserError(
        f"{place}: the fields {names_of(row)} fit {len(names)} formats: {', '.join(names)}",
        f"set data.format to one of {', '.join(names)}",
    )
