"""Reads rows from a JSON array or from JSON Lines, each with the place it came from.

Which of the two a file is follows from its first character, not from its name. What is wrong with a row is told
with file and line; several bad rows are told at once. Rows are held in memory: data larger than that, and other
file formats, are not read here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config import UserError

SHOWN = 5  # bad rows told at once


@dataclass(frozen=True)
class Row:
    """One record and where it stands (`tickets.jsonl:12`, or `tickets.json[12]`, counted from 1)."""

    value: dict[str, Any]
    place: str


def read_rows(path: str, setting: str, limit: int | None = None) -> list[Row]:
    """All rows of a file, or its first `limit`.

    Args:
        path: The file.
        setting: The setting that named it, for messages (`data.train`).

    Raises:
        UserError: The file is missing, a folder, not text, empty, or a row is not a JSON object.
    """
    text = _text(Path(path).expanduser(), f"{setting} = {path}", setting)
    name = Path(path).name
    if text.lstrip()[:1] == "[":
        values = [(f"{name}[{n}]", value) for n, value in enumerate(_array(text, name), 1)]
        bad: list[str] = []
    else:
        values, bad = _lines(text, name)
    rows = []
    for place, value in values:
        if isinstance(value, dict):
            rows.append(Row(value, place))
        else:
            bad.append(f"{place}: a row must be a JSON object, this is {_kind(value)}")
    raise_bad_rows(bad, "mend these rows or take them out")
    if not rows:
        raise UserError(f"{setting} = {path}: the file holds no rows", f"name a file with rows in {setting}")
    return rows[:limit]


def raise_bad_rows(bad: list[str], fix: str) -> None:
    """Raise one UserError for all bad rows, if there are any."""
    if bad:
        more = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        count = "1 bad row" if len(bad) == 1 else f"{len(bad)} bad rows"
        raise UserError(f"{count} in the data\n  " + "\n  ".join(bad[:SHOWN]) + more, fix)


def _text(path: Path, what: str, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{what}: no such file (looked in {Path.cwd()})", f"name an existing file in {setting}"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{what}: is a folder", f"name a JSON or JSONL file in {setting}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{what}: line {line} is not UTF-8 text", "save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror})", f"name a readable file in {setting}") from None


def _array(text: str, name: str) -> list[Any]:
    try:
        values: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}:{error.lineno}: broken JSON: {error.msg}", "mend the file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: JSON that cannot be read: {error}", "mend the file") from None
    return values


def _lines(text: str, name: str) -> tuple[list[tuple[str, Any]], list[str]]:
    values, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values.append((f"{name}:{number}", json.loads(line)))
        except json.JSONDecodeError as error:
            bad.append(f"{name}:{number}: broken JSON: {error.msg} at column {error.colno}: {line.strip()[:60]}")
        except (ValueError, RecursionError) as error:
            bad.append(f"{name}:{number}: JSON that cannot be read: {error}")
    return values, bad


def _kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return kinds.get(type(value), "null")
