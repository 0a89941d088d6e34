"""Rows and files of any size are read in bounded memory, whatever they unpack to."""

import gc
import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.row_files import PACK, lines, refused, rows, separated, source, written
from veneer.config import UserError
from veneer.data.sources.block import BYTES, ROWS, Unreadable
from veneer.data.sources.find import find_sources
from veneer.data.sources.read import parse, read_blocks
from veneer.data.sources.unpacked import page_sizes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that hold one row of 50 MB between small ones."""
    folder, value = tmp_path_factory.mktemp("large"), "x" * 50_000_000
    written(folder / "large.jsonl", f'{{"a": "1"}}\n{{"a": "{value}"}}\n{{"a": "3"}}\n')
    written(folder / "large.json", f'[{{"a": "1"}},\n{{"a": "{value}"}},\n{{"a": "3"}}]\n')
    written(folder / "large.csv", f"a\n1\n{value}\n3\n")
    return folder


@pytest.mark.parametrize("name", ["large.jsonl", "large.json", "large.csv"])
def test_a_row_of_50_mb_stands_between_its_neighbours(large: Path, name: str) -> None:
    read = rows(str(large / name))
    assert [len(row["a"]) for row in read if isinstance(row, dict)] == [1, 50_000_000, 1]


def length(row: Any) -> int:
    return len(row if isinstance(row, bytes) else row["text"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt", "rows.parquet", "rows.jsonl.gz"])
def test_blocks_and_memory_stay_small_whatever_the_size(tmp_path: Path, name: str) -> None:
    """24 MB of short rows, and of rows of 100 kB."""
    short = [{"text": f"{n:0100}"} for n in range(40_000)]
    records = short + [{"text": "y" * 100_000}] * 200
    path = tmp_path / name
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif name == "rows.json":
        written(path, json.dumps(records, indent=0))
    elif name == "rows.csv":
        written(path, separated(records, "excel"))
    elif name == "rows.txt":
        written(path, "\n".join(record["text"] for record in records))
    else:
        written(path, PACK[".gz" if name.endswith(".gz") else ""](lines(records)))
    del short, records
    count, firsts = 0, set()
    found = source(str(path))
    tracemalloc.start()
    try:
        for block in read_blocks(found, "data.train"):
            count += len(block.rows)
            firsts.add(block.place(0))
            size = sum(map(length, block.rows))
            assert len(block.rows) <= ROWS
            assert size <= 1.1 * BYTES
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_200
    assert len(firsts) >= 45
    assert peak < 20_000_000


def test_a_parquet_file_of_one_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{n:01000}" for n in range(50_000)]})
    pq.write_table(table, tmp_path / "rows.parquet", compression="none", use_dictionary=False)
    del table
    found, before = source(str(tmp_path / "rows.parquet")), pa.total_allocated_bytes()
    held = max(pa.total_allocated_bytes() - before for _ in read_blocks(found, "data.train"))
    assert held < 16_000_000


BOMB = 64 << 20  # bytes that a row unpacks to


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a few kilobytes, each with a row of many MiB between small ones."""
    folder = tmp_path_factory.mktemp("bombs")
    whole, nested = b"x" * BOMB, b"[{}]," * (BOMB >> 9)
    row = b'{"text": "%s"}'
    files = {
        "lines.jsonl": (row + b"\n") * 3 % (b"a", whole, b"b"),
        "array.json": b"[" + b",".join([row] * 3) % (b"a", b'\\"' * (BOMB >> 6), b"b") + b"]",
        "nested.json": b'[{"text": "a"}, {"text": [%s1]}, {"text": "b"}]' % nested,
        "strings.json": b'[{"text": "a"}, "%s", {"text": "b"}]' % whole,
        "table.csv": b"text,n\na,1\n%s,2\nb,3\n" % whole,
        "lines.txt": b"a\n%s\nb\n" % whole,
    }
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    pq.write_table(pa.table({"text": ["a", "x" * BOMB, "b"]}), folder / "rows.parquet", row_group_size=1)
    return folder


@pytest.mark.parametrize(
    "name",
    ["lines.jsonl", "array.json", "nested.json", "strings.json", "table.csv", "lines.txt", "rows.parquet"],
)
def test_a_row_that_unpacks_to_more_than_the_limit_is_one_bad_row_in_bounded_memory(bombs: Path, name: str) -> None:
    (path,) = bombs.glob(f"{name}*")
    (source,) = find_sources(str(path), "data.train")
    tracemalloc.start()
    try:
        found = [row for block in read_blocks(source, "data.train", max_row_bytes=1 << 17) for row in block.rows]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    first, bomb, last = (parse(row) for row in found)
    assert [row["text"] for row in (first, last) if isinstance(row, dict)] == ["a", "b"]
    assert isinstance(bomb, Unreadable)
    assert bomb.reason == "is longer than data.max_row_bytes = 131,072"
    assert peak < 32 << 20


@pytest.mark.parametrize("text_by", ["paragraph", "file"])
def test_a_text_of_many_lines_has_the_same_limit(tmp_path: Path, text_by: str) -> None:
    path = written(tmp_path / "a.txt", "the cat says\n" * 200)
    (source,) = find_sources(path, "data.train")
    for limit, is_read in ((2048, False), (4096, True)):
        ((row,),) = (block.rows for block in read_blocks(source, "data.train", text_by, limit))
        assert isinstance(row, dict) is is_read


def test_a_hundred_thousand_columns_are_read(tmp_path: Path) -> None:
    names = [f"c{n}" for n in range(100_000)]
    path = written(tmp_path / "wide.csv", "\n".join([",".join(names)] + [",".join("ab" for _ in names)] * 2))
    assert [len(row) for row in rows(path) if isinstance(row, dict)] == [100_000] * 2
    twins = written(tmp_path / "twins.csv", ",".join(names * 2) + "\n")
    assert "several columns are named c0, c1, c2, c3, c4" in refused(twins)


@pytest.mark.parametrize("unit", ['\\"', "\\\\", "a", "\U0001f600,", "]"])
@pytest.mark.parametrize("form", ['{{"a": "{}"}}', '["{}"]', '{{"a": [["{}"], {{}}], "b": 1}}'])
def test_a_huge_row_of_an_array_is_passed_over_in_few_steps(tmp_path: Path, unit: str, form: str) -> None:
    huge = form.format(unit * (3 * 2**20 // len(unit)))
    assert_passed_over(tmp_path, huge)


@pytest.mark.parametrize("unit", ["1,", "[],", '{"a":"]"},', '"\\"",', '"\\\\",'])
def test_a_row_of_very_many_small_values_is_too(tmp_path: Path, unit: str) -> None:
    assert_passed_over(tmp_path, '{"a": [' + unit * (3 * 2**20 // len(unit)) + '{}], "b": "x"}')


def assert_passed_over(folder: Path, huge: str) -> None:
    path = folder / "rows.json"
    path.write_text('[{"a": 1}, ' + huge + ' , {"a": 2},' + huge + "]", encoding="utf-8")
    (source,) = find_sources(str(path), "data.train")
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += 1

    before = sys.getprofile()
    gc.collect()
    gc.disable()  # finalizers of what other tests left would be counted
    sys.setprofile(count)
    try:
        rows = [row for block in read_blocks(source, "data.train", max_row_bytes=4096) for row in block.rows]
    finally:
        sys.setprofile(before)
        gc.enable()
    too_long = Unreadable("is longer than data.max_row_bytes = 4,096")
    assert rows == [{"a": 1}, too_long, {"a": 2}, too_long]
    assert calls < 20_000  # and not one for each of millions of characters


PACKED_TABLE = pa.table({"text": ["a", "x" * (80 << 20), "b"], "more": ["y"] * 3})  # 80 MiB in a few kB


@pytest.mark.parametrize("name", ["one.parquet", "two.arrow", "three.arrow", "dictionary.arrow", "saved"])
def test_what_unpacks_to_more_than_may_be_held_is_refused_before_it_is_unpacked(tmp_path: Path, name: str) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    path, table = tmp_path / name, PACKED_TABLE
    if name == "one.parquet":
        pq.write_table(table, path, compression="zstd")
    elif name == "saved":
        datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(path))
        (file,) = path.glob("*.arrow")
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema, options=options) as writer:
            writer.write_table(table)
    else:
        if name == "dictionary.arrow":
            table = pa.table({"text": table["text"].dictionary_encode()})
        new = pa.ipc.new_stream if name == "three.arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as out, new(out, table.schema, options=options) as writer:
            writer.write_table(table)
    found, before = source(str(path)), pa.total_allocated_bytes()
    with pytest.raises(
        UserError, match=r"unpacks to 83,\d{3},\d{3} bytes, and at most 67,108,864 (.|\n)*data\.max_row_bytes"
    ):
        list(read_blocks(found, "data.train", max_row_bytes=1 << 20))
    assert pa.total_allocated_bytes() - before < 1 << 20
    if name != "saved":  # whose own description is of another table
        rows = [row for block in read_blocks(found, "data.train", max_row_bytes=16 << 20) for row in block.rows]
        assert rows[1] == Unreadable("is longer than data.max_row_bytes = 16,777,216")
        assert [row["text"] for row in (rows[0], rows[2]) if isinstance(row, dict)] == ["a", "b"]


def test_a_large_value_that_many_rows_share_is_not_held_for_each(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * (1 << 20)] * 500})
    pq.write_table(table, tmp_path / "rows.parquet", dictionary_pagesize_limit=8 << 20)
    assert (tmp_path / "rows.parquet").stat().st_size < 1 << 20
    found, most = source(str(tmp_path / "rows.parquet")), 0
    del table
    before, count = pa.total_allocated_bytes(), 0
    for block in read_blocks(found, "data.train", max_row_bytes=1 << 20):
        most, count = max(most, pa.total_allocated_bytes() - before), count + len(block.rows)
    assert (count, most < 64 << 20) == (500, True)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"data_page_version": "2.0", "use_dictionary": False}, {"data_page_size": 1000, "write_page_checksum": True}],
)
def test_page_headers_of_every_form_are_read(tmp_path: Path, compression: str, settings: dict[str, Any]) -> None:
    texts = ["x" * n for n in range(2000)]
    table = pa.table({"text": texts, "nested": [[{"role": text[:9], "n": 1}] for text in texts]})
    pq.write_table(table, tmp_path / "rows.parquet", compression=compression, row_group_size=900, **settings)
    held = pq.ParquetFile(tmp_path / "rows.parquet").metadata
    groups = [held.row_group(n) for n in range(held.num_row_groups)]
    with (tmp_path / "rows.parquet").open("rb") as file:
        for column in (group.column(n) for group in groups for n in range(group.num_columns)):
            sizes = [size for _, size in page_sizes(file, column)]
            headers = column.total_uncompressed_size - sum(sizes)
            assert 0 < headers < 5000 * len(sizes)  # statistics stand in them, too
            with pytest.raises(ValueError, match="page"):
                list(page_sizes(io.BytesIO(b"\xff" * 10), column))
