"""Rows given as Python objects are written once, as a file that the settings then name.

A run's record is its run.yaml, which can name files but hold no objects. So a list of dicts, a `datasets.Dataset` or a
pandas DataFrame becomes a file of JSON lines in Veneer's cache folder, under the SHA-256 of its content. Equal rows are
the same file in every process, so a run resumes with them; and everything that reads rows reads files alone. Neither
library is imported here: an object is known by its methods.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError

FIX = "give a list of dicts, a datasets.Dataset or a pandas DataFrame, or name files"


def rows_as_file(value: Any, setting: str) -> Any:
    """Replace rows by the path of a file that holds them; names, paths and numbers stay what they are.

    Args:
        value: rows, or what else the setting takes.
        setting: name of the setting, for messages and the file's name (`data.train`: train.jsonl).

    Raises:
        UserError: There are no rows, an object is of another kind, or holds a value that JSON has no form for.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple) and value and all(isinstance(name, str | os.PathLike) for name in value):
        return [os.fspath(name) for name in value]
    from veneer.config.cache import cached

    digest, name = hashlib.sha256(setting.encode()), f"{setting.split('.')[-1]}.jsonl"
    for line in _lines(value, setting):
        digest.update(line)

    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.writelines(_lines(value, setting))

    return str((cached(f"rows/{digest.hexdigest()[:32]}", make) / name).absolute())


def without_nulls(value: Any) -> Any:
    """A value of a table without its null fields, at every depth: tables fill keys that a row never had with null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _lines(value: Any, setting: str) -> Iterator[bytes]:
    """The rows as lines of JSON."""
    number = 0
    for number, row in enumerate(_rows(value, setting), 1):
        if not isinstance(row, Mapping):
            raise UserError(f"{setting}: row {number} is of type {type(row).__name__}; a row is a dict", FIX)
        try:
            yield json.dumps(dict(row), default=_plain).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{setting}: row {number} cannot be written as JSON: {error}", "change or leave out that column"
            ) from None
    if not number:
        raise UserError(f"{setting}: there are no rows in this {type(value).__name__}", FIX)


def _rows(value: Any, setting: str) -> Iterator[Any]:
    """The rows of an object; those of tables without nulls."""
    if isinstance(value, list | tuple):
        yield from value
    elif hasattr(value, "to_dict") and hasattr(value, "notna"):  # a pandas DataFrame
        if not value.columns.is_unique:
            raise UserError(f"{setting}: several columns of the DataFrame have the same name", "rename them")
        yield from map(without_nulls, value.astype(object).where(value.notna(), None).to_dict("records"))
    elif hasattr(value, "column_names") and hasattr(value, "num_rows") and not isinstance(value, Mapping):
        yield from map(without_nulls, value)  # a datasets.Dataset; a DatasetDict is a mapping of several
    else:
        raise UserError(f"{setting}: an object of type {type(value).__name__} is not taken as rows", FIX)


def _plain(value: Any) -> Any:
    """Dates as ISO text, arrays of NumPy and torch as lists."""
    for name in ("isoformat", "tolist"):
        if hasattr(value, name):
            return getattr(value, name)()
    raise TypeError(f"JSON has no form for a value of type {type(value).__name__}")
