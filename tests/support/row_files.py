"""Rows in files of every kind, and all that reading such a file gives."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from veneer.config import UserError
from veneer.data.sources.block import RowBlock, Unreadable
from veneer.data.sources.find import DataSource, find_sources
from veneer.data.sources.read import parse, read_blocks

RECORDS = [{"prompt": f'what, {n}?\n\tönd "now"', "completion": f"the cat {n}"} for n in range(1, 8)]


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(data).to_pybytes()
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def separated(records: list[dict[str, str]], dialect: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), dialect=dialect)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


TEXTS = {
    "rows.jsonl": (lines(RECORDS), "json lines"),
    "rows.ndjson": (lines(RECORDS), "json lines"),
    "lines.json": (lines(RECORDS), "json lines"),
    "array.json": (json.dumps(RECORDS, indent=1).encode(), "json array"),
    "array.jsonl": (b"\n " + json.dumps(RECORDS, ensure_ascii=False).encode(), "json array"),
    "rows.csv": (separated(RECORDS, "excel"), "csv"),
    "rows.tsv": (separated(RECORDS, "excel-tab"), "tsv"),
    "lines.txt": (lines(RECORDS), "json lines"),
    "lines": (lines(RECORDS), "json lines"),
    "array.dat": (json.dumps(RECORDS).encode(), "json array"),
    "commas.dat": (separated(RECORDS, "excel"), "csv"),
    "tabs.dat": (separated(RECORDS, "excel-tab"), "tsv"),
}


def written(path: Path, content: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def source(named: str | list[str], **settings: Any) -> DataSource:
    (found,) = find_sources(named, "data.train", **settings)
    return found


def blocks(named: str | list[str] | DataSource, text_by: str = "line") -> list[RowBlock]:
    found = [named] if isinstance(named, DataSource) else find_sources(named, "data.train")
    return [block for one in found for block in read_blocks(one, "data.train", text_by)]


def rows(named: str | list[str] | DataSource, text_by: str = "line") -> list[dict[str, Any] | Unreadable]:
    return [parse(row) for block in blocks(named, text_by) for row in block.rows]


def places(named: str | list[str], text_by: str = "line") -> list[str]:
    return [block.place(at) for block in blocks(named, text_by) for at in range(len(block.rows))]


def reasons(named: str) -> dict[str, str]:
    """What is told of each unreadable row, by its place."""
    told = [(block.place(at), parse(row)) for block in blocks(named) for at, row in enumerate(block.rows)]
    return {place: row.reason for place, row in told if isinstance(row, Unreadable)}


def refused(named: str | list[str], **settings: Any) -> str:
    """The message of the error that finding or reading raises; it always names the setting."""
    with pytest.raises(UserError) as caught:
        for one in find_sources(named, "data.train", **settings):
            list(read_blocks(one, "data.train"))
    assert "data.train" in str(caught.value)
    return str(caught.value)


def save_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=3)


def save_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def save_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def save_folder(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).save_to_disk(path, num_shards=2)


def save_splits(path: Path, train: str = "train", **more: list[dict[str, str]]) -> None:
    splits = {split: datasets.Dataset.from_list(records) for split, records in ({train: RECORDS} | more).items()}
    datasets.DatasetDict(splits).save_to_disk(path)
