"""Finds the unpacked size of a Parquet or Arrow file by its headers, before anything of it is unpacked.

pyarrow unpacks a page of Parquet and a record batch of Arrow as a whole, whatever it grows to, and shows neither size
beforehand. Both stand in the file, in front of what is packed: in page headers (Thrift's compact protocol, as in
parquet.thrift) and in the first eight bytes of a packed buffer (Arrow's Message.fbs, a FlatBuffer). Only what leads to
those numbers is read here.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from veneer.config import UserError

TIMES = 8  # of the longest row: what may be unpacked at once
AT_LEAST = 64 << 20  # bytes that may be, however short the longest row
PAGE_HEADER_BYTES = 1 << 14  # of a page header, at first; statistics in it may be longer
DICTIONARY_PAGE = 2
EARLY_COMPRESSION = b"ARROW:experimental_compression"  # how Arrow 0.17 said that a batch is packed
DICTIONARY_BATCH, RECORD_BATCH = 2, 3


def require_pages(stream: BinaryIO, group: Any, what: str, longest: int) -> int:
    """The bytes of the largest dictionary of a row group, each of whose values may be as large.

    Args:
        stream: The Parquet file.
        group: pyarrow's RowGroupMetaData.
        what: Names the file in messages.
        longest: Bytes of the longest row (`data.max_row_bytes`).

    Raises:
        UserError: A page unpacks to more than may be unpacked at once.
        ValueError: A page header is damaged.
    """
    largest = 0
    for n in range(group.num_columns):
        column = group.column(n)
        for is_dictionary, size in page_sizes(stream, column):
            _require(size, f"{what}: a page of the column {column.path_in_schema}", "row groups", longest)
            largest = max(largest, size if is_dictionary else 0)
    return largest


def require_batches(file: Path, what: str, longest: int) -> None:
    """Refuse an Arrow file of which more would be unpacked at once than may be.

    Args:
        file: An Arrow file or stream.
        what: Names it in messages.
        longest: Bytes of the longest row (`data.max_row_bytes`).

    Raises:
        UserError: A record batch or a dictionary unpacks to more.
        ValueError: It is damaged in a way that pyarrow might not see.
    """
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped:
        try:
            for number, size in enumerate(arrow_sizes(mapped), 1):
                _require(size, f"{what}: part {number} of {file.name}", "record batches", longest)
        except (UserError, pa.ArrowException) as error:
            if isinstance(error, UserError):
                raise  # the other is of a file that is cut off, and told with the row where it is read
        except struct.error:
            raise ValueError(f"the header of a part of {file.name} is damaged") from None


def _require(size: int, what: str, parts: str, longest: int) -> None:
    most = max(AT_LEAST, TIMES * longest)
    if size > most:
        raise UserError(
            f"{what} unpacks to {size:,} bytes, and at most {most:,} are unpacked at once "
            f"({TIMES} times data.max_row_bytes = {longest:,})",
            f"write it in smaller {parts}, or raise data.max_row_bytes",
        )


def page_sizes(stream: BinaryIO, chunk: Any) -> Iterator[tuple[bool, int]]:
    """Each page of a column chunk: whether it is its dictionary, and its unpacked size in bytes.

    Args:
        stream: The Parquet file.
        chunk: pyarrow's ColumnChunkMetaData.

    Raises:
        ValueError: A page header is damaged.
    """
    at = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)), default=chunk.data_page_offset)
    end = at + chunk.total_compressed_size
    while at < end:
        fields, length = _page_header(stream, at)
        yield fields.get(1) == DICTIONARY_PAGE, fields.get(2, 0)
        if min(fields.get(2, -1), fields.get(3, -1)) < 0:
            raise ValueError(f"the header of the page at byte {at} is damaged")
        at += length + fields[3]


def _page_header(stream: BinaryIO, at: int) -> tuple[dict[int, int], int]:
    """The integers of a page header by their field, and its length."""
    size = PAGE_HEADER_BYTES
    while True:
        stream.seek(at)
        data = stream.read(size)
        try:
            return _struct(data, 0)
        except IndexError:
            if len(data) < size or size > 1 << 24:
                raise ValueError(f"the header of the page at byte {at} is cut off") from None
            size *= 32


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, int], int]:
    """Integer fields of a struct in Thrift's compact protocol, and where it ends."""
    found, field = {}, 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            field += kind >> 4
        else:
            field, at = _integer(data, at)
        kind &= 15
        if kind in (4, 5, 6):
            found[field], at = _integer(data, at)
        elif kind == 8:
            length, at = _varint(data, at)
            at += length
        elif kind == 12 and depth < 4:
            at = _struct(data, at, depth + 1)[1]
        elif kind not in (1, 2):  # true and false have no bytes of their own; page headers hold nothing else
            raise ValueError("a page header holds what none has")
    return found, at + 1


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def arrow_sizes(mapped: Any) -> Iterator[int]:
    """The unpacked size in bytes of each record batch and dictionary of an Arrow file or stream with packed buffers.

    Args:
        mapped: pyarrow's MemoryMappedFile.

    Raises:
        ValueError, struct.error, pyarrow.ArrowException: It is damaged.
    """
    import pyarrow as pa

    mapped.seek(0)
    if mapped.read(6) == b"ARROW1":
        for offset in _blocks(mapped):
            mapped.seek(offset)
            yield _message_size(pa.ipc.read_message(mapped))
        return
    mapped.seek(0)
    messages = pa.ipc.MessageReader.open_stream(mapped)
    while True:
        try:
            yield _message_size(messages.read_next_message())
        except StopIteration:
            return


def _blocks(mapped: Any) -> list[int]:
    """The offsets of the dictionaries and record batches of an Arrow file, by its footer."""
    mapped.seek(max(0, mapped.size() - 10))
    length, _ = struct.unpack("<i6s", mapped.read(10))
    mapped.seek(max(0, mapped.size() - 10 - length))
    footer = _Table.root(mapped.read(length))
    return [offset for field in (2, 3) for (offset,) in footer.vector(field, "<q16x")]


def _message_size(message: Any) -> int:
    data, body = message.metadata.to_pybytes(), message.body
    table = _Table.root(data)
    kind = table.number(1, "<B")
    if kind not in (DICTIONARY_BATCH, RECORD_BATCH) or body is None:
        return 0
    batch = table.table(2)
    batch = batch.table(1) if batch is not None and kind == DICTIONARY_BATCH else batch
    is_packed = batch is not None and (batch.table(3) is not None or EARLY_COMPRESSION in data)
    if batch is None or not is_packed:  # it is mapped and not held
        return 0
    size = 0
    for offset, length in batch.vector(2, "<qq"):
        if length >= 8:
            (unpacked,) = struct.unpack_from("<q", body, offset)
            size += unpacked if unpacked >= 0 else length  # -1: this one is not packed
    return size


class _Table:
    """A table of a FlatBuffer."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - struct.unpack_from("<i", data, at)[0]

    @classmethod
    def root(cls, data: bytes) -> "_Table":
        return cls(data, struct.unpack_from("<I", data, 0)[0])

    def _place(self, field: int) -> int | None:
        if 4 + 2 * field >= struct.unpack_from("<H", self._data, self._fields)[0]:
            return None
        offset = struct.unpack_from("<H", self._data, self._fields + 4 + 2 * field)[0]
        return self._at + offset if offset else None

    def number(self, field: int, form: str) -> int:
        place = self._place(field)
        return 0 if place is None else int(struct.unpack_from(form, self._data, place)[0])

    def _follow(self, field: int) -> int | None:
        place = self._place(field)
        return None if place is None else place + struct.unpack_from("<I", self._data, place)[0]

    def table(self, field: int) -> "_Table | None":
        place = self._follow(field)
        return None if place is None else _Table(self._data, place)

    def vector(self, field: int, form: str) -> list[tuple[int, ...]]:
        """The structs of a vector, each unpacked by `form`."""
        place = self._follow(field)
        if place is None:
            return []
        count = struct.unpack_from("<I", self._data, place)[0]
        return list(struct.iter_unpack(form, self._data[place + 4 : place + 4 + count * struct.calcsize(form)]))
