"""Guesses from its first rows what is amiss with a file whose rows fit no format, and what would help."""

from collections.abc import Mapping, Sequence
from typing import Any

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
COLUMNS = "write one object a row (pandas: to_json(path, orient='records', lines=True))"


def hint_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Why the rows may fit no format, to stand behind that message, and how to mend it; empty: nothing is known."""
    row = rows[0]
    if len(row) == 1:
        (field,) = row
        if separator := next((name for mark, name in SEPARATORS.items() if mark in field), None):
            return f": the file is separated by {separator}", "separate its columns by commas"
        if isinstance(row[field], list) and row[field] and all(isinstance(inner, dict) for inner in row[field]):
            count = len(row[field])
            return f": `{field}` holds the rows themselves ({count:,})", f"write the list within `{field}` alone"
    if len(row) == 1 or any(len(field.split()) > 3 for field in row):
        return "; is a header line missing?", ""
    return "", ""


def is_columns(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the one row holds a list of texts (or pandas' object of them) in each field, all of one length."""
    if len(rows) != 1 or len(rows[0]) < 2:
        return False
    values = [list(v.values()) if isinstance(v, dict) else v for v in rows[0].values()]
    if not all(isinstance(value, list) and value for value in values) or len({len(value) for value in values}) != 1:
        return False
    return all(isinstance(value[0], str | int | float) for value in values)
