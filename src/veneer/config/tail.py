"""Reads files of JSON lines that another process appends to: their last records, or what is new in them.

Nothing here raises for what a line holds: lines that are no JSON objects are passed over, and a line without its end,
which is being written or was cut by a crash, is none yet.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 2**16  # bytes that are read at once, from the end
LONGEST_LINE = 2**22  # bytes beyond which a file is not one of records


def last_of_kinds(path: Path, *kinds: str) -> dict[str, dict[str, Any]]:
    """Return the last record of each kind, read from the end of the file; kinds without one are left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in _lines_from_end(path):
        # Most lines are of a kind that is known already, and parsing each would take most of the time.
        if any(kind not in found and f'"{kind}"'.encode() in line for kind in kinds):
            record = _record(line)
            kind = record.get("kind")
            if kind in kinds and kind not in found:
                found[kind] = record
        if len(found) == len(kinds):
            break
    return found


def last_record(path: Path) -> dict[str, Any]:
    """Return the last whole record; empty: there is none."""
    return next((record for line in _lines_from_end(path) if (record := _record(line))), {})


class FollowedFile:
    """A file of JSON lines that grows, and may be replaced by one that was cut back.

    Args:
        path: The file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None  # held open, so that no other file gets its number
        self._rest = b""
        self._seen: list[dict[str, Any]] = []

    def read_new(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Return new records, and those that still stand where some that were read have been cut off, else None."""
        if self._is_same():
            new = self._read()
            self._seen += new
            return new, None
        self.close()
        before, self._seen = self._seen, []
        try:
            self._file = self._path.open("rb")
            self._seen = self._read()
        except OSError:
            self.close()
        common = 0
        while common < min(len(before), len(self._seen)) and before[common] == self._seen[common]:
            common += 1
        return self._seen[common:], self._seen[:common] if common < len(before) else None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file, self._rest = None, b""

    def _is_same(self) -> bool:
        """Whether the file that is open is the one that is there, with all that was read of it."""
        if self._file is None:
            return False
        try:
            opened, there = os.fstat(self._file.fileno()), self._path.stat()
        except OSError:
            return False
        return os.path.samestat(opened, there) and there.st_size >= self._file.tell()

    def _read(self) -> list[dict[str, Any]]:
        assert self._file is not None
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [record for line in lines if (record := _record(line))]


def _lines_from_end(path: Path) -> Iterator[bytes]:
    """Yield whole lines, the last one first; none, where the file cannot be read."""
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            end, rest, is_whole = file.seek(0, os.SEEK_END), b"", False
            while end > 0 and len(rest) < LONGEST_LINE:
                start = max(0, end - BLOCK)
                file.seek(start)
                rest, *lines = (file.read(end - start) + rest).split(b"\n")
                end = start
                if lines and not is_whole:
                    lines.pop()  # empty where the last line is whole
                    is_whole = True
                yield from reversed(lines)
            if end <= 0 and is_whole:
                yield rest
    except OSError:
        return


def _record(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; empty: it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
