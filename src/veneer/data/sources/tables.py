"""Reads the rows of Parquet and Arrow files, Arrow folders and hub datasets, in slices that fit a block.

Keys whose value is null are left out at every depth, since Arrow fills keys that a row never had with null; a row
without a key and one with null there cannot be told apart.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.config import UserError
from veneer.config.rows import without_nulls
from veneer.data.sources.block import BYTES, ROWS, Piece, Row, Unreadable, too_long, twins
from veneer.data.sources.find import DataSource
from veneer.data.sources.hub import open_dataset
from veneer.data.sources.json_text import CHUNK
from veneer.data.sources.unpacked import TIMES, require_batches, require_pages


def table_pieces(source: DataSource, setting: str, longest: int) -> Iterator[Piece]:
    import pyarrow as pa

    at = 1
    try:
        for batch in _batches(source, setting, longest):
            if batch is None:
                yield [at], [too_long(longest)]
                at += 1
                continue
            if shared := twins(batch.schema.names):
                what = f"{setting} = {source.location}: several columns are named {shared}"
                raise UserError(what, f"rename them, or name another file in {setting}")
            batch.validate()
            for part in _parts(batch):
                rows: list[Row] = _python(part) if len(part) > 1 or _size(part) <= longest else [too_long(longest)]
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
