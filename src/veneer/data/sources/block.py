"""Holds rows as they come from a source: a block of them, each with the place it came from."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

ROWS = 1000  # of a block, at most
BYTES = 4 << 20  # of a block, about; a single row may be larger


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that cannot be read, in its place among the others."""

    reason: str


Row = bytes | dict[str, Any] | Unreadable
Item = tuple[int, Row, int]  # number, row, its size in bytes or characters
Piece = tuple[list[int], list[Row]]  # numbers and rows of a block


@dataclass(frozen=True)
class RowBlock:
    """Some rows of one source that follow each other.

    `numbers` count from 1: lines of a text (of its record's first line) if `by_line`, else rows. A row of bytes is a
    line of JSON for `parse`.
    """

    name: str
    by_line: bool
    numbers: list[int]
    rows: list[Row]

    def place(self, at: int) -> str:
        """The place of row `at` of this block: `tickets.jsonl:12`, or `tickets.json[12]`."""
        number = self.numbers[at]
        return f"{self.name}:{number}" if self.by_line else f"{self.name}[{number}]"


def too_long(longest: int) -> Unreadable:
    return Unreadable(f"is longer than data.max_row_bytes = {longest:,}")


def twins(names: list[str]) -> str:
    """Names that several columns have, the first of them; nothing where all differ."""
    return ", ".join([name for name, count in Counter(names).items() if count > 1][:5])
