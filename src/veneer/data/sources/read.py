"""Reads the rows of a source in blocks, each row with the place it came from, in memory that no file can exceed.

A row that cannot be read stays in its place as `Unreadable`, so that the ledger can count it; so does one that is
longer than `data.max_row_bytes`, which is passed over and never held, as in a file that unpacks to more than it should.
What cannot be resumed after a fault (a JSON array, a quote never closed, a damaged archive) is a UserError that tells
file and line.

JSON lines come as bytes, not parsed: parsing is what costs, and `parse` runs in worker processes. All other kinds come
as dicts. CSV is read strictly: a quote in the wrong place makes its record unreadable where the csv module's default
would change the value in silence. Every CSV value is a str. Line ends of texts become `\\n`. tables.py reads Parquet,
Arrow and hub datasets.

Not done here: recognising what a row means, joining files, shuffling.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from itertools import compress
from typing import Any, BinaryIO

from veneer.config import UserError
from veneer.data.sources.block import BYTES, ROWS, Item, Piece, Row, RowBlock, Unreadable, too_long, twins
from veneer.data.sources.find import DataSource, as_user_errors
from veneer.data.sources.json_text import CHUNK, JsonText
from veneer.data.sources.kind import chunks, open_plain
from veneer.data.sources.tables import table_pieces

LONGEST = 64 << 20  # bytes of a row, by default
FIELD_BYTES = 64  # of memory that each field of a row takes beside its characters
NUL = "holds NUL bytes: the file is damaged, or not UTF-8 text"


def read_blocks(
    source: DataSource, setting: str, text_by: str = "line", max_row_bytes: int = LONGEST
) -> Iterator[RowBlock]:
    """The rows of a source, in order, at most 1000 of them and about 4 MiB at a time.

    Args:
        source: source that `find_sources` gave.
        setting: name of the setting that named it, for messages (`data.train`).
        text_by: row of a text: a `line` that is not blank, a `paragraph` between blank lines, or the `file`.
        max_row_bytes: limit of a row; a longer one is Unreadable. Of JSON arrays and CSV, characters are counted.

    Raises:
        UserError: The source holds no rows, is damaged, or cannot be read. Blocks may have been given before.
    """
    by_line = source.kind in ("json lines", "csv", "tsv", "text", "conll")
    empty = True
    with as_user_errors(source.location, setting):
        for numbers, rows in _pieces(source, setting, text_by, max_row_bytes):
            empty = False
            yield RowBlock(source.name, by_line, numbers, rows)
    if empty:
        raise UserError(f"{setting} = {source.location}: the file holds no rows", f"name a file with rows in {setting}")


def parse(row: Row) -> dict[str, Any] | Unreadable:
    """The object that a line of JSON holds; other rows pass as they are."""
    if not isinstance(row, bytes):
        return row
    if b"\0" in row:
        return Unreadable(NUL)
    try:
        text = row.decode()
        return _object(json.loads(text))
    except UnicodeDecodeError as error:
        return Unreadable(_not_utf8(error))
    except json.JSONDecodeError as error:
        return Unreadable(f"broken JSON: {error.msg} at column {error.colno}: {text.strip()[:60]}")
    except (ValueError, RecursionError) as error:
        return Unreadable(f"JSON that cannot be read: {error}")


def _object(value: Any) -> dict[str, Any] | Unreadable:
    if isinstance(value, dict):
        return value
    kinds = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return Unreadable(f"a row must be a JSON object, this is {kinds.get(type(value), 'null')}")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text: byte {error.object[error.start]:#04x} at byte {error.start + 1}"


def _pieces(source: DataSource, setting: str, text_by: str, longest: int) -> Iterator[Piece]:
    if source.kind in ("parquet", "arrow", "arrow folder", "hub dataset"):
        yield from table_pieces(source, setting, longest)
        return
    with open_plain(source.location, source.compression) as stream:
        if source.kind == "json lines":
            yield from _json_lines(stream, longest)
        elif source.kind == "json array":
            yield from _grouped(_json_array(stream, source.name, setting, longest))
        elif source.kind == "text":
            yield from _grouped(_texts(stream, text_by, longest))
        elif source.kind == "conll":
            yield from _grouped(_sentences(stream, longest))
        else:
            yield from _grouped(_csv(stream, source, setting, longest))


def _grouped(items: Iterable[Item]) -> Iterator[Piece]:
    numbers: list[int] = []
    rows: list[Row] = []
    size = 0
    for number, row, row_size in items:
        if rows and (len(rows) == ROWS or size + row_size > BYTES):
            yield numbers, rows
            numbers, rows, size = [], [], 0
        numbers.append(number)
        rows.append(row)
        size += row_size
    if rows:
        yield numbers, rows


def _line_batches(stream: BinaryIO, longest: int) -> Iterator[tuple[int, list[bytes]]]:
    """Lines without their `\\n`, with the number of the first; below 4 CHUNKs together, or one line alone.

    Of a line that is longer than `longest`, one byte more than that is given.
    """
    number = 1
    begun: list[bytes] = []  # a line of which the end is not read yet
    size = 0
    for chunk in chunks(stream, CHUNK):
        lines = chunk.split(b"\n")
        if size <= longest:
            begun.append(lines[0][: longest + 1 - size])
            size += len(lines[0])
        if len(lines) > 1:
            lines[0] = b"".join(begun)
            begun = [lines.pop()]
            size = len(begun[0])
            if len(lines[0]) > CHUNK:
                yield number, lines[:1]
                number += 1
                del lines[0]
            yield number, lines
            number += len(lines)
    if last := b"".join(begun):
        yield number, [last]


def _json_lines(stream: BinaryIO, longest: int) -> Iterator[Piece]:
    for first, batch in _line_batches(stream, longest):
        for at in range(0, len(batch), ROWS):
            lines = batch[at : at + ROWS]
            numbers = range(first + at, first + at + len(lines))
            is_row = [bool(line) and not line.isspace() for line in lines]
            rows: list[Row] = [line if len(line) <= longest else too_long(longest) for line in compress(lines, is_row)]
            if rows:
                yield list(compress(numbers, is_row)), rows


def _json_array(stream: BinaryIO, name: str, setting: str, longest: int) -> Iterator[Item]:
    text = JsonText(stream, name, setting)
    number, mark = 0, text.mark()
    assert mark == "[", "find_sources calls a file an array by its first character"
    text.at += 1
    if text.mark() == "]":
        mark = "]"
        text.at += 1
    while mark != "]":
        if not text.mark():
            raise text.broken(text.at, "broken JSON: the array is not closed")
        value, size = text.value(longest)
        number += 1
        yield number, _object(value) if size else too_long(longest), size
        mark = text.mark()
        if mark not in (",", "]"):
            why = "expecting ',' or ']' after a row" if mark else "the array is not closed"
            raise text.broken(text.at, f"broken JSON: {why}")
        text.at += 1
    if text.mark():
        raise text.broken(text.at, "broken JSON: more text after the end of the array")


def _csv(stream: BinaryIO, source: DataSource, setting: str, longest: int) -> Iterator[Item]:
    header: list[str] | None = None
    for first, last, record in _records(stream, source, setting, longest):
        if header is None:
            header = _header(record, f"{source.name}:{first}", setting)
            continue
        row: Row
        if isinstance(record, Unreadable):
            row = record
        elif sum(map(len, record)) > longest:
            row = too_long(longest)
        elif len(record) == len(header):
            row = dict(zip(header, record))
        else:
            row = Unreadable(f"{len(record)} fields where the header has {len(header)}")
        if isinstance(row, Unreadable) and last > first:
            # It may have swallowed rows that were whole: the user must see how far it goes.
            row = Unreadable(f"{row.reason} (the record goes from line {first} to {last})")
        size = 0 if isinstance(record, Unreadable) else sum(map(len, record)) + FIELD_BYTES * len(record)
        yield first, row, size


def _header(record: list[str] | Unreadable, place: str, setting: str) -> list[str]:
    fix = f"the first line must name the columns; mend the file that {setting} names"
    if isinstance(record, Unreadable):
        raise UserError(f"{place}: the header {record.reason}", fix)
    if "" in record:
        index = "; is it the index of a pandas frame? write that with to_csv(index=False)" if not record[0] else ""
        raise UserError(f"{place}: column {record.index('') + 1} of {len(record)} has no name{index}", fix)
    if shared := twins(record):
        raise UserError(f"{place}: several columns are named {shared}", fix)
    return record


def _records(
    stream: BinaryIO, source: DataSource, setting: str, longest: int
) -> Iterator[tuple[int, int, list[str] | Unreadable]]:
    """First line, last line and fields of each record that is not blank."""
    damage: list[str] = []  # found in the lines of the record that is being read
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        buffered = io.BufferedReader(stream, CHUNK)  # type: ignore[type-var]
        with io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            while line := text.readline(longest + 1):
                if len(line) > longest:
                    damage.append(too_long(longest).reason)
                    while line and not line.endswith(("\n", "\r")):
                        line = text.readline(CHUNK)
                    line = "\n"
                elif "\0" in line:
                    damage.append(NUL)
                elif not line.isascii() and (why := _undecoded(line)):
                    damage.append(why)
                yield line
        ended = True

    reader = csv.reader(lines(), dialect="excel-tab" if source.kind == "tsv" else "excel", strict=True)
    while True:
        damage.clear()
        first = reader.line_num + 1
        try:
            record = _next_record(reader, longest)
        except csv.Error as error:
            if ended or "field limit" in str(error):
                raise UserError(
                    f"{source.name}:{first}: a quote that opens in this record is never closed, or not within "
                    f"data.max_row_bytes = {longest:,}",
                    f"double the quotes within quoted fields of the file that {setting} names",
                ) from None
            damage.append(f"has a quote in the wrong place: {error}; quotes within quoted fields must be doubled")
            record = []
        if record is None:
            return
        if record or damage:
            yield first, reader.line_num, Unreadable(damage[0]) if damage else record


def _next_record(reader: Iterator[list[str]], longest: int) -> list[str] | None:
    # The limit is global state of the csv module; one row may be larger than its 128 KiB.
    before = csv.field_size_limit(longest)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _undecoded(line: str) -> str:
    """Why a line that was decoded with surrogateescape is not UTF-8, or nothing."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        return f"is not UTF-8 text: byte {ord(line[error.start]) - 0xDC00:#04x} at column {error.start + 1}"
    return ""


def _texts(stream: BinaryIO, text_by: str, longest: int) -> Iterator[Item]:
    first, held, size = 1, list[bytes](), 0
    for number, batch in _line_batches(stream, longest):
        for at, line in enumerate(batch, number):
            line = line.removesuffix(b"\r")
            if text_by == "line":
                if line.strip():
                    yield at, _text(line, longest), len(line)
            elif line.strip() or text_by == "file":
                first, size = (first, size) if held else (at, 0)
                if size <= longest:  # one line more than fits, so that it is seen to be too long
                    held.append(line)
                size += len(line) + 1
            elif held:
                yield first, *_joined(held, longest)
                held = []
    if any(line.strip() for line in held):
        yield first, *_joined(held, longest)


def _sentences(stream: BinaryIO, longest: int) -> Iterator[Item]:
    """Lines of a word and its tag, up to a blank line."""
    for number, row, size in _texts(stream, "paragraph", longest):
        yield number, {"conll": row["text"]} if isinstance(row, dict) else row, size


def _joined(lines: list[bytes], longest: int) -> tuple[Row, int]:
    joined = b"\n".join(lines)
    return _text(joined, longest), min(len(joined), longest)


def _text(line: bytes, longest: int) -> Row:
    if len(line) > longest:
        return too_long(longest)
    if b"\0" in line:
        return Unreadable(NUL)
    try:
        return {"text": line.decode()}
    except UnicodeDecodeError as error:
        return Unreadable(_not_utf8(error))
