"""Reads the rows of a source in blocks, each row with the place it came from, in memory that no file can exceed.

A row that cannot be read stays in its place as `Unreadable`, so that the ledger can count it; so does one that is
longer than `data.max_row_bytes`, which is passed over and never held, as in a file that unpacks to more than it should.
What cannot be resumed after a fault (a JSON array, a quote never closed, a damaged archive) is a UserError that tells
file and line.

JSON lines come as bytes, not parsed: parsing is what costs, and `parse` runs in worker processes. All other kinds come
as dicts. CSV is read strictly: a quote in the wrong place makes its record unreadable where the csv module's default
would change the value in silence. Every CSV value is a str. Line ends of texts become `\\n`. In Parquet, Arrow and hub
rows, keys whose value is null are left out at every depth, since Arrow fills keys that a row never had with null; a
row without a key and one with null there cannot be told apart.

Not done here: recognising what a row means, joining files, shuffling.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO

from veneer.config import UserError
from veneer.config.rows import without_nulls
from veneer.data.sources.find import DataSource, chunks, open_dataset, open_plain, told
from veneer.data.sources.json_text import CHUNK, JsonText
from veneer.data.sources.unpacked import TIMES, require_batches, require_pages

ROWS = 1000  # of a block, at most
BYTES = 4 << 20  # of a block, about; a single row may be larger
LONGEST = 64 << 20  # bytes of a row, by default
FIELD_BYTES = 64  # of memory that each field of a row takes beside its characters
NUL = "holds NUL bytes: the file is damaged, or not UTF-8 text"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands in place of a row that cannot be read."""

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
        """Where row `at` of this block stands: `tickets.jsonl:12`, or `tickets.json[12]`."""
        number = self.numbers[at]
        return f"{self.name}:{number}" if self.by_line else f"{self.name}[{number}]"


def read_blocks(
    source: DataSource, setting: str, text_by: str = "line", max_row_bytes: int = LONGEST
) -> Iterator[RowBlock]:
    """The rows of a source, in order, at most 1000 of them and about 4 MiB at a time.

    Args:
        source: From `find_sources`.
        setting: The setting that named it, for messages (`data.train`).
        text_by: What is a row of a text: a `line` that is not blank, a `paragraph` between blank lines, or the `file`.
        max_row_bytes: A longer row is Unreadable. Of JSON arrays and CSV, characters are counted.

    Raises:
        UserError: The source holds no rows, is damaged, or cannot be read. Blocks may have been given before.
    """
    by_line = source.kind in ("json lines", "csv", "tsv", "text")
    empty = True
    with told(source.location, setting):
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


def _too_long(longest: int) -> Unreadable:
    return Unreadable(f"is longer than data.max_row_bytes = {longest:,}")


def _pieces(source: DataSource, setting: str, text_by: str, longest: int) -> Iterator[Piece]:
    if source.kind in ("parquet", "arrow", "arrow folder", "hub dataset"):
        yield from _table_pieces(source, setting, longest)
        return
    with open_plain(source.location, source.compression) as stream:
        if source.kind == "json lines":
            yield from _json_lines(stream, longest)
        elif source.kind == "json array":
            yield from _grouped(_json_array(stream, source.name, setting, longest))
        elif source.kind == "text":
            yield from _grouped(_texts(stream, text_by, longest))
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
            rows: list[Row] = [line if len(line) <= longest else _too_long(longest) for line in compress(lines, is_row)]
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
        yield number, _object(value) if size else _too_long(longest), size
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
            row = _too_long(longest)
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
    if twins := _twins(record):
        raise UserError(f"{place}: several columns are named {twins}", fix)
    return record


def _twins(names: list[str]) -> str:
    """Names that several columns have, the first of them; nothing where all differ."""
    return ", ".join([name for name, count in Counter(names).items() if count > 1][:5])


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
                    damage.append(_too_long(longest).reason)
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


def _joined(lines: list[bytes], longest: int) -> tuple[Row, int]:
    joined = b"\n".join(lines)
    return _text(joined, longest), min(len(joined), longest)


def _text(line: bytes, longest: int) -> Row:
    if len(line) > longest:
        return _too_long(longest)
    if b"\0" in line:
        return Unreadable(NUL)
    try:
        return {"text": line.decode()}
    except UnicodeDecodeError as error:
        return Unreadable(_not_utf8(error))


def _table_pieces(source: DataSource, setting: str, longest: int) -> Iterator[Piece]:
    import pyarrow as pa

    at = 1
    try:
        for batch in _batches(source, setting, longest):
            if batch is None:
                yield [at], [_too_long(longest)]
                at += 1
                continue
            if twins := _twins(batch.schema.names):
                what = f"{setting} = {source.location}: several columns are named {twins}"
                raise UserError(what, f"rename them, or name another file in {setting}")
            batch.validate()
            for part in _parts(batch):
                rows: list[Row] = _python(part) if len(part) > 1 or _size(part) <= longest else [_too_long(longest)]
                yield list(range(at, at + len(rows))), rows
                at += len(rows)
    except (pa.ArrowException, ValueError) as error:  # the latter of a damaged schema or header
        if isinstance(error, UserError):
            raise
        what = f"{setting} = {source.location}: damaged {source.kind} after row {at - 1} ({error})"
        raise UserError(what, f"write it again, or name another in {setting}") from error


def _batches(source: DataSource, setting: str, longest: int) -> Iterator[Any]:
    """Record batches of whatever size the source is cut into; None: a row that is longer than that."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    what = f"{setting} = {source.location}"
    if source.kind == "parquet":
        # Unless both are said, a whole row group, which may be the whole file, is held in memory.
        small = {"pre_buffer": False, "buffer_size": CHUNK}
        opened = pq.ParquetFile(source.location, page_checksum_verification=True, **small)
        with opened as file, open(source.location, "rb") as stream:
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                if group.num_rows == 1 and group.total_byte_size > 2 * longest:  # its encoding counts, too
                    yield None
                    continue
                largest = require_pages(stream, group, what, longest)
                mean = max(1, group.total_byte_size // max(1, group.num_rows), largest // TIMES)
                yield from file.iter_batches(min(ROWS, max(1, longest // mean)), row_groups=[number])
    elif source.kind == "arrow":
        require_batches(Path(source.location), what, longest)
        with pa.memory_map(source.location) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            if is_file:
                reader = pa.ipc.open_file(mapped)
                yield from (reader.get_batch(n) for n in range(reader.num_record_batches))
            else:
                yield from pa.ipc.open_stream(mapped)
    else:
        if source.kind == "arrow folder":
            for path in sorted(Path(source.location).glob("*.arrow")):
                require_batches(path, what, longest)
        # As Arrow, so that images and audio are not decoded.
        for table in open_dataset(source, setting).with_format("arrow").iter(batch_size=ROWS):
            yield from table.to_batches()


def _parts(batch: Any) -> Iterator[Any]:
    """A batch in slices that fit a block."""
    if batch.num_rows > ROWS:
        for at in range(0, batch.num_rows, ROWS):
            yield from _parts(batch.slice(at, ROWS))
    elif batch.num_rows > 1 and _size(batch) > BYTES:
        half = batch.num_rows // 2
        yield from _parts(batch.slice(0, half))
        yield from _parts(batch.slice(half))
    elif batch.num_rows:
        yield batch


def _size(batch: Any) -> float:
    """Bytes of a slice. It counts the whole of its dictionary, so of that the values that are used are counted."""
    import pyarrow as pa
    import pyarrow.compute as pc

    size = 0.0
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            try:
                lengths = pc.binary_length(column.dictionary).take(column.indices)
                size += (pc.sum(lengths).as_py() or 0) + 8 * len(column)
            except (
                pa.ArrowNotImplementedError,
                pa.ArrowIndexError,
            ):  # no texts, or a damaged place, which is told later
                size += column.dictionary.nbytes / max(1, len(column.dictionary)) * len(column)
        else:
            size += column.nbytes
    return size


def _python(batch: Any) -> list[Row]:
    """Rows of a slice. Unchecked offsets would crash the process: a slice that is not sound is read row by row."""
    try:
        batch.validate(full=True)
        return [without_nulls(row) for row in batch.to_pylist(maps_as_pydicts="strict")]
    except (ValueError, LookupError, OverflowError) as error:
        if batch.num_rows == 1:
            return [Unreadable(f"cannot be read: {str(error).splitlines()[0]}")]
        return [row for at in range(batch.num_rows) for row in _python(batch.slice(at, 1))]
