"""What a setting names is found, known for what it is, and read row by row, each with its place."""

import csv
import gzip
import io
import json
import logging
import os
import random
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from veneer.config import UserError
from veneer.data.sources.block import BYTES, ROWS, RowBlock, Unreadable
from veneer.data.sources.find import DataSource, find_sources
from veneer.data.sources.read import parse, read_blocks
from veneer.data.sources.unpacked import page_sizes

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


# Every kind


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", TEXTS)
def test_every_kind_of_text_gives_the_same_rows(tmp_path: Path, name: str, packed: str) -> None:
    content, kind = TEXTS[name]
    found = source(written(tmp_path / (name + packed), PACK[packed](content)))
    assert (found.kind, found.compression) == (kind, {"": None, ".gz": "gzip", ".zst": "zstd"}[packed])
    assert rows(found) == RECORDS


@pytest.mark.parametrize("packed", PACK)
def test_compression_follows_from_the_content_not_from_the_name(tmp_path: Path, packed: str) -> None:
    assert rows(written(tmp_path / "rows.csv", PACK[packed](separated(RECORDS, "excel")))) == RECORDS
    assert rows(written(tmp_path / "rows.jsonl.gz", PACK[packed](lines(RECORDS)))) == RECORDS


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


@pytest.mark.parametrize(
    ("save", "kind"),
    [
        (save_parquet, "parquet"),
        (save_arrow_file, "arrow"),
        (save_arrow_stream, "arrow"),
        (save_folder, "arrow folder"),
        (save_splits, "arrow folder"),
    ],
)
def test_every_kind_of_table_gives_the_same_rows(
    tmp_path: Path, save: Callable[[Path], None], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with_bars = datasets.utils.are_progress_bars_disabled()
    save(tmp_path / "tickets")
    capfd.readouterr()
    found = source(str(tmp_path / "tickets"))
    assert (found.name, found.kind) == ("tickets", kind)
    assert rows(found) == RECORDS
    assert places(str(tmp_path / "tickets"))[-1] == "tickets[7]"
    assert capfd.readouterr() == ("", ""), "no progress bars"
    assert datasets.utils.are_progress_bars_disabled() == with_bars, "the caller's setting stays"


def test_a_split_is_taken_or_the_only_one_or_none(tmp_path: Path) -> None:
    save_splits(tmp_path / "both", test=RECORDS[:2])
    save_splits(tmp_path / "only", train="everything")
    assert len(rows(source(str(tmp_path / "both")))) == 7
    assert len(rows(source(str(tmp_path / "both"), split="test"))) == 2
    only = source(str(tmp_path / "only"))
    assert (only.split, len(rows(only))) == ("everything", 7)
    told = refused(str(tmp_path / "both"), split="dev")
    assert "has no split dev; its splits are train, test" in told
    # A test set that is not there must not become the training set.
    assert "its splits are everything" in refused(str(tmp_path / "only"), split="test")


def test_keys_that_arrow_filled_with_null_are_left_out(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "calls": [{"name": "f"}]}]},
        {"messages": [], "note": {"by": {"whom": "me"}}},
        {"note": {"by": {}}},
    ]
    table = pa.Table.from_pylist(records, pa.Table.from_pylist([{**records[1], **records[0]}]).schema)
    pq.write_table(table, tmp_path / "nested.parquet")
    assert table.to_pylist()[2]["messages"] is None
    assert rows(str(tmp_path / "nested.parquet")) == records


def test_maps_become_objects_and_bad_text_in_a_table_is_told_by_row(tmp_path: Path) -> None:
    table = pa.table({"tags": pa.array([[("a", 1)], [("a", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int64()))})
    pq.write_table(table, tmp_path / "maps.parquet")
    first, second, third = rows(str(tmp_path / "maps.parquet"))
    assert (first, third) == ({"tags": {"a": 1}}, {"tags": {}})
    assert isinstance(second, Unreadable)

    strings = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"\xe9!", b"ok"]).buffers())
    with pa.OSFile(str(tmp_path / "bad.arrow"), "wb") as file:
        batch = pa.record_batch({"text": strings})
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
    assert list(reasons(str(tmp_path / "bad.arrow"))) == ["bad.arrow[2]"]
    assert rows(str(tmp_path / "bad.arrow"))[2] == {"text": "ok"}


def test_a_large_dictionary_does_not_cut_its_column_into_single_rows(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays([n % 7 for n in range(2000)], [f"{n:01000}" for n in range(8000)])
    assert column.nbytes > BYTES
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file:
        table = pa.table({"text": column})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    assert len(blocks(str(tmp_path / "t.arrow"))) == 2


# Texts


def test_a_text_is_cut_into_lines_paragraphs_or_left_whole(tmp_path: Path) -> None:
    path = written(tmp_path / "story.txt", b"\xef\xbb\xbfone, two\r\nthree\n \n\n\xc3\xb6ne\n\x85\nbad \xe9\nlast")
    assert rows(path)[:3] == [{"text": "one, two"}, {"text": "three"}, {"text": "öne"}]
    assert places(path) == [f"story.txt:{n}" for n in (1, 2, 5, 6, 7, 8)]
    assert list(reasons(path)) == ["story.txt:6", "story.txt:7"]
    assert reasons(path)["story.txt:7"] == "is not UTF-8 text: byte 0xe9 at byte 5"
    assert rows(path, "paragraph")[0] == {"text": "one, two\nthree"}
    assert places(path, "paragraph") == ["story.txt:1", "story.txt:5"]
    good = written(tmp_path / "good.md", "\n# One\r\n\r\ntwo\n")
    assert rows(good, "file") == [{"text": "\n# One\n\ntwo"}]
    assert places(good, "file") == ["good.md:1"]
    assert rows(good, "paragraph") == [{"text": "# One"}, {"text": "two"}]
    assert reasons(written(tmp_path / "nul.txt", "a\nb\0\nc")) == {
        "nul.txt:2": "holds NUL bytes: the file is damaged, or not UTF-8 text"
    }


def test_prose_that_begins_with_a_brace_is_prose(tmp_path: Path) -> None:
    assert source(written(tmp_path / "a.txt", "{{ greeting }}, dear\n")).kind == "text"
    assert source(written(tmp_path / "b.txt", '{"text": "' + "x" * 100_000 + '"}\n')).kind == "json lines"
    assert source(written(tmp_path / "prose", "nothing but words\n")).kind == "text"


# JSON


def test_blank_lines_count_and_line_ends_and_byte_order_marks_are_no_part_of_a_row(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", b'\xef\xbb\xbf\r\n{"a": 1}\r\n\n   \n{"a": 2}\n{"a": NaN}\n{"a": 4}')
    assert places(path) == [f"rows.jsonl:{n}" for n in (2, 5, 6, 7)]
    assert [row["a"] for row in rows(path) if isinstance(row, dict) and row["a"] == row["a"]] == [1, 2, 4]
    array = written(tmp_path / "rows.json", b'\xef\xbb\xbf[ {"a": 1},\r\n\r\n{"a": 2} ]\n\n')
    assert rows(array) == [{"a": 1}, {"a": 2}]
    assert places(array) == ["rows.json[1]", "rows.json[2]"]


def test_a_line_that_is_no_row_is_told_and_its_neighbours_are_read(tmp_path: Path) -> None:
    bad = {
        b'{"a": 1': "broken JSON: Expecting ',' delimiter at column 8: {\"a\": 1",
        b'{"a": "' + b"x" * 100: 'broken JSON: Unterminated string starting at at column 7: {"a": "' + "x" * 53,
        b'{"a": "\xe9"}': "is not UTF-8 text: byte 0xe9 at byte 8",
        b'{"a": "\x00"}': "holds NUL bytes: the file is damaged, or not UTF-8 text",
        b"[1]": "a row must be a JSON object, this is an array",
        b'"a"': "a row must be a JSON object, this is a string",
        b"3": "a row must be a JSON object, this is a number",
        b"true": "a row must be a JSON object, this is a boolean",
        b"null": "a row must be a JSON object, this is null",
    }
    path = written(tmp_path / "rows.jsonl", b'{"a": 0}\n' + b'\n{"a": 0}\n'.join(bad) + b'\n{"a": 0}\n')
    assert list(reasons(path).values()) == list(bad.values())
    assert list(reasons(path)) == [f"rows.jsonl:{2 * n}" for n in range(1, len(bad) + 1)]
    deep = parse(b'{"a": ' + b"[" * 100_000)
    assert isinstance(deep, Unreadable)
    assert "JSON that cannot be read" in deep.reason
    assert "JSON that cannot be read" in str(parse(b'{"a": ' + b"1" * 5000 + b"}"))
    assert parse({"a": 1}) == {"a": 1}
    assert parse(Unreadable("why")) == Unreadable("why")


def test_rows_of_an_array_that_are_no_objects_are_told(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.json", '[{"a": 1}, 3, 1.5e+3, null, {"a": 2}]')
    assert list(reasons(path)) == ["rows.json[2]", "rows.json[3]", "rows.json[4]"]
    assert rows(path)[-1] == {"a": 2}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[\n{"a": 1},\n{]', "rows.json:3: broken JSON: Expecting property name"),
        ('[\n{"a": 1}\n{"a": 2}]', "rows.json:3: broken JSON: expecting ',' or ']' after a row"),
        ('[\n{"a": 1},\n]', "rows.json:3: broken JSON: Expecting value"),
        ('[\n{"a": 1},\n', "rows.json:3: broken JSON: the array is not closed"),
        ('[\n{"a": 1}\n', "rows.json:3: broken JSON: the array is not closed"),
        ('[\n{"a": "1', "rows.json:2: broken JSON: Unterminated string"),
        ('[\n{"a": 1}]\n[]', "rows.json:3: broken JSON: more text after the end of the array"),
        ('[\n{"a": ' + "[" * 100_000, "rows.json:2: JSON that cannot be read"),
        (b'[\n{"a": 1},\n{"a": "\xe9"}]', "rows.json:3: not UTF-8 text"),
        (b'[\n{"a": 1},\n{"a": "\0"}]', "rows.json:3: broken JSON: Invalid control character"),
        ("[ ]", "the file holds no rows"),
    ],
)
def test_a_broken_array_is_refused_with_its_line(tmp_path: Path, content: bytes | str, told: str) -> None:
    assert told in refused(written(tmp_path / "rows.json", content))


def test_an_array_reads_the_same_wherever_its_bytes_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: list[Any] = [{"ö": '😀"\\\u2028 ', "b": [1.5e30, -2, True, None, {}]}, {}, {"c": 'é"' * 40}, {"d": 1e-7}]
    for ascii in (True, False):
        path = written(tmp_path / f"{ascii}.json", json.dumps(values, ensure_ascii=ascii, indent=1))
        for chunk in range(1, 80):
            monkeypatch.setattr("veneer.data.sources.read.CHUNK", chunk)
            assert rows(path) == values
    broken = written(tmp_path / "broken.json", '[\n{"a": 1},\n' + '{"a":\n"öö"},\n' * 50 + "{]\n]")
    for chunk in range(1, 80):
        monkeypatch.setattr("veneer.data.sources.read.CHUNK", chunk)
        assert "broken.json:103:" in refused(broken)


def test_lines_read_the_same_wherever_their_bytes_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\n\n{"a": "' + b"x" * 50 + b'"}\r\n \n\n\n{"a": 2}\n{}'
    path = written(tmp_path / "rows.jsonl", content)
    whole, where = rows(path), places(path)
    assert where == [f"rows.jsonl:{n}" for n in (1, 3, 7, 8)]
    for chunk in range(3, 80):
        monkeypatch.setattr("veneer.data.sources.read.CHUNK", chunk)
        assert rows(path) == whole
        assert places(path) == where


# CSV


def test_a_record_that_does_not_fit_is_told_with_its_line(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbf"a",b\r\n1,2\r\n\r\n"x\ny",3\r\n1\r\n1,2,3\r\n1,\xe9\r\n1,\0\r\n"x\ny\n",3,4\r\n"x"y,2\r\n5,6'
    )
    path = written(tmp_path / "rows.csv", content)
    good = [row for row in rows(path) if isinstance(row, dict)]
    assert good == [{"a": "1", "b": "2"}, {"a": "x\ny", "b": "3"}, {"a": "5", "b": "6"}]
    told = reasons(path)
    assert told.pop("rows.csv:13").startswith("has a quote in the wrong place: ',' expected after '\"'")
    assert (
        told
        == {
            "rows.csv:6": "1 fields where the header has 2",
            "rows.csv:7": "3 fields where the header has 2",
            "rows.csv:8": "is not UTF-8 text: byte 0xe9 at column 3",
            "rows.csv:9": "holds NUL bytes: the file is damaged, or not UTF-8 text",
            "rows.csv:10": "3 fields where the header has 2 (the record goes from line 10 to 12)",
        }
        or told
    )
    assert places(path)[:2] == ["rows.csv:2", "rows.csv:4"]


def test_columns_need_names_of_their_own(tmp_path: Path) -> None:
    assert "rows.csv:2: several columns are named b" in refused(written(tmp_path / "rows.csv", "\na,b,b\n1,2,3\n"))
    assert "rows.csv:1: column 1 of 2 has no name" in refused(written(tmp_path / "rows.csv", ",b\n1,2\n"))
    assert "the header is not UTF-8" in refused(written(tmp_path / "rows.csv", b"a,\xe9\n1,2\n"))
    assert "the header has a quote in the wrong place" in refused(written(tmp_path / "rows.csv", '"a"b,c\n1,2\n'))
    assert "holds no rows" in refused(written(tmp_path / "rows.csv", "a,b\n\n"))
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "twins.parquet")
    assert "several columns are named a" in refused(str(tmp_path / "twins.parquet"))


def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n')
    assert "rows.csv:3: a quote that opens in this record is never closed" in refused(path)
    path = written(tmp_path / "long.csv", 'a,b\n1,2\n3,"4\n' + "5,6\n" * 100)
    with pytest.raises(UserError, match=r"long\.csv:3: a quote .* is never closed, or not within data\.max_row_bytes"):
        list(read_blocks(find_sources(path, "data.train")[0], "data.train", max_row_bytes=100))


def test_old_line_ends_and_the_modules_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = written(tmp_path / "mac.csv", "a,b\r1," + "x" * 200_000 + "\r3,4\r")
    assert [row["a"] for row in rows(path) if isinstance(row, dict)] == ["1", "3"]
    assert csv.field_size_limit() == before


# Size


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


# What a setting names


def test_files_globs_and_folders_are_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "deep/er/c.jsonl", ".hidden.jsonl", ".git/d.jsonl", "deep/a.json"):
        written(tmp_path / "data" / name, PACK[".gz" if name.endswith(".gz") else ""](lines(RECORDS)))
    for other in ("README.md", "deep/image.png", "_SUCCESS"):
        written(tmp_path / "data" / other, b"\x00")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def names(named: str | list[str]) -> list[str]:
        return [one.name for one in find_sources(named, "data.train")]

    assert names("data") == ["a.jsonl.gz", "b.jsonl", "a.json", "c.jsonl"]
    assert names("~/data/") == names("data")
    assert names("data/*.jsonl") == ["b.jsonl"]
    assert names("data/**/*.json*") == ["a.jsonl.gz", "b.jsonl", "a.json", "c.jsonl"]
    assert names(["data/b.jsonl", "~/data/a*"]) == ["b.jsonl", "a.jsonl.gz"]
    assert len(rows(["data/b.jsonl", "data/deep"])) == 3 * len(RECORDS)
    written(tmp_path / "odd[1].jsonl", lines(RECORDS))
    assert names("odd[1].jsonl") == ["odd[1].jsonl"]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("x/1/rows.jsonl", "y/1/rows.jsonl", "y/2/rows.jsonl", "y/2/other.jsonl"):
        written(tmp_path / name, lines(RECORDS[:1]))
    assert places(str(tmp_path)) == ["x/1/rows.jsonl:1", "y/1/rows.jsonl:1", "other.jsonl:1", "2/rows.jsonl:1"]


def test_arrow_folders_are_read_whole_and_once(tmp_path: Path) -> None:
    save_folder(tmp_path / "data" / "saved")
    written(tmp_path / "data" / "rows.jsonl", lines(RECORDS))
    for named in ("data", "data/**", "data/*"):
        found = find_sources(str(tmp_path / named), "data.train")
        assert [one.kind for one in found] == ["json lines", "arrow folder"]
    # Named by the user, its files are files.
    assert len(rows(str(tmp_path / "data" / "saved" / "*.arrow"))) == 7


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    written(tmp_path / "data" / "rows.jsonl", lines(RECORDS))
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    assert len(find_sources(str(tmp_path / "data"), "data.train")) == 1


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("none.jsonl", "data.train = none.jsonl: no such file (looked in {cwd})"),
        ("data/none.jsonl", "no such file (looked in {cwd}/data)"),
        ("nowhere/none.jsonl", "no such file (there is no folder {cwd}/nowhere)"),
        ("../none", "no such file (looked in "),
        ("data/*.csv", "matches no file (looked from {cwd})"),
        ("empty", "the folder holds no data files (.json .jsonl"),
        ("", "data.train names no data"),
        ([], "data.train names no data"),
        (["data/rows.jsonl", "data/*"], "data/rows.jsonl: is named twice"),
        (["org/name", "org/name"], "org/name: is named twice"),
        ("pipe", "is neither a file nor a folder"),
        ("x" * 5000, "a name in it has 5000 bytes, at most 255 are allowed"),
        ("\0", "holds a NUL character, which no path may"),
    ],
)
def test_names_that_lead_nowhere_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | list[str], told: str
) -> None:
    written(tmp_path / "data" / "rows.jsonl", lines(RECORDS))
    written(tmp_path / "empty" / "README.md", "nothing")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    assert told.format(cwd=tmp_path) in refused(named)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "rows.jsonl", lines(RECORDS))
    found = source(path)

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("veneer.data.sources.kind.io.FileIO", denied)
    monkeypatch.setattr(Path, "open", denied)
    assert f"data.train = {path}: cannot be read (Permission denied)" in refused(path)
    with pytest.raises(UserError, match="Permission denied"):
        list(read_blocks(found, "data.train"))
    with pytest.raises(UserError, match="Permission denied"):
        found.fingerprint()


PRETTY = json.dumps({"messages": [{"role": "user", "content": "x" * 200_000}]}, indent=2)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.jsonl", b"", "the file holds no rows"),
        ("rows.jsonl", b"\n \n" * 50_000, "the file holds no rows"),
        ("rows.jsonl", b"\xef\xbb\xbf", "the file holds no rows"),
        ("rows.jsonl.gz", gzip.compress(b"", mtime=0), "the file holds no rows"),
        ("rows.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16 or UTF-32\n  fix: save the file as UTF-8"),
        ("rows.csv", b"\xfe\xff" + "a,b".encode("utf-16-be"), "UTF-16 or UTF-32"),
        ("rows.txt", "a".encode("utf-32"), "UTF-16 or UTF-32"),
        ("rows.json", json.dumps({"a": 1, "b": {}}, indent=2), "one JSON object over several lines"),
        ("rows.jsonl", PRETTY, "one JSON object over several lines"),
        ("rows.zip", b"PK\x03\x04", "a zip archive"),
        ("rows.tar.gz", gzip.compress(b"rows.jsonl".ljust(257, b"\0") + b"ustar\0", mtime=0), "a tar archive"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("rows.parquet", b"abc", "its content is no .parquet data"),
        ("image.png", b"\x89PNG\0", "its content is no .png data"),
        ("rows.parquet.gz", gzip.compress(b"PAR1PAR1", mtime=0), "is a parquet file within gzip"),
    ],
)
def test_files_that_hold_no_rows_are_refused(tmp_path: Path, name: str, content: bytes | str, told: str) -> None:
    assert told in refused(written(tmp_path / name, content))


def test_a_first_row_that_is_cut_off_is_a_row_that_is_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", b'{"a": \n{"a": "' + b"x" * 100_000 + b'"}\n')
    assert "broken JSON" in reasons(path)["rows.jsonl:1"]
    assert len(rows(path)) == 2


# Damage


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_archives_may_be_joined_and_cut_ones_are_refused(tmp_path: Path, packed: str) -> None:
    record = {"text": random.Random(0).randbytes(200_000).hex()}
    whole = PACK[packed](lines([record]))
    joined = PACK[packed](b"") + whole + PACK[packed](lines(RECORDS))
    assert rows(written(tmp_path / f"rows.jsonl{packed}", joined)) == [record, *RECORDS]
    for damaged in (whole[:9], whole[: len(whole) // 2], whole[:-2], whole + b"garbage"):
        told = refused(written(tmp_path / f"rows.jsonl{packed}", damaged))
        assert f"rows.jsonl{packed}: damaged (" in told


def test_a_byte_order_mark_may_be_spread_over_the_members_of_an_archive(tmp_path: Path) -> None:
    members = [b"\xef", b"\xbb", b"\xbf", lines(RECORDS)]
    assert rows(written(tmp_path / "rows.jsonl.gz", b"".join(map(gzip.compress, members)))) == RECORDS


def test_a_parquet_page_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["the cat"]}), path, write_page_checksum=True, compression="none")
    assert "damaged" in refused(written(path, path.read_bytes().replace(b"the cat", b"the rat", 1)))


def test_an_archive_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(lines(RECORDS))
    path = written(tmp_path / "rows.jsonl.gz", packed[:-8] + b"\1\2\3\4" + packed[-4:])
    assert "damaged (" in refused(path)


@pytest.mark.parametrize("save", [save_parquet, save_arrow_file, save_arrow_stream])
def test_damaged_tables_are_refused(tmp_path: Path, save: Callable[[Path], None]) -> None:
    save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for cut in (12, len(whole) // 2, len(whole) - 12 - 100 * (save is save_arrow_stream)):
        assert "damaged" in refused(written(tmp_path / "cut", whole[:cut]))


def test_a_damaged_arrow_folder_is_refused(tmp_path: Path) -> None:
    save_folder(tmp_path / "saved")
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    assert "damaged Arrow folder" in refused(str(tmp_path / "saved"))
    written(tmp_path / "saved" / "dataset_dict.json", "{}")
    assert "dataset_dict.json is damaged" in refused(str(tmp_path / "saved"))


# Fingerprints


def test_a_fingerprint_changes_with_the_content_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines(RECORDS))
    same = written(tmp_path / "b.jsonl", lines(RECORDS))
    other = written(tmp_path / "c.jsonl", lines(RECORDS[1:]))
    assert source(path).fingerprint() == source(same).fingerprint() != source(other).fingerprint()
    assert len(source(path).fingerprint()) == 64
    save_folder(tmp_path / "one")
    save_folder(tmp_path / "two")
    datasets.Dataset.from_list(RECORDS[1:]).save_to_disk(tmp_path / "three", num_shards=2)
    one, two, three = (source(str(tmp_path / name)).fingerprint() for name in ("one", "two", "three"))
    assert one == two != three
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read"):
        replace(source(path), location="gone.jsonl").fingerprint()


# The hub


def test_a_hub_dataset_is_loaded_by_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **settings: Any) -> datasets.Dataset:
        asked.append((args, settings, datasets.utils.are_progress_bars_disabled()))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = source("org/tickets-2.0", split="dev", subset="en")
    assert (found.kind, found.name) == ("hub dataset", "org/tickets-2.0")
    assert not asked, "finding alone asks nobody"
    assert rows(found) == RECORDS
    assert asked == [(("org/tickets-2.0", "en"), {"split": "dev"}, True)]
    assert next(read_blocks(found, "data.train")).place(2) == "org/tickets-2.0[3]"
    assert found.fingerprint() == datasets.Dataset.from_list(RECORDS)._fingerprint


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionError("Couldn't reach 'org/name' on the Hub"), "the hub cannot be reached (Couldn't reach"),
        (ValueError('Unknown split "dev". Should be one of'), 'the hub does not give it (Unknown split "dev"'),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist"), "does not give it (Dataset"),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported"),
    ],
)
def test_what_the_hub_does_not_give_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    level = logging.getLogger("datasets").level
    message = refused("org/name", split="dev", subset="en")
    assert told in message
    assert "split dev of subset en" in message
    assert "download the dataset and name its files in data.train" in message
    assert logging.getLogger("datasets").level == level


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


def test_what_is_no_file_within_a_folder_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a" / "rows.jsonl", "{}")
    for name, make in (
        ("pipe.jsonl", os.mkfifo),
        ("zero.jsonl", lambda path: os.symlink("/dev/zero", path)),
    ):
        make(tmp_path / "a" / name)
        with pytest.raises(UserError, match=rf"{name}: is neither a file nor a folder, but a pipe"):
            find_sources(str(tmp_path / "a"), "data.train")
        (tmp_path / "a" / name).unlink()


def test_the_index_of_a_frame_is_named(tmp_path: Path) -> None:
    told = refused(written(tmp_path / "rows.csv", ",a\n0,b\n"))
    assert "column 1 of 2 has no name; is it the index of a pandas frame?" in told


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
    sys.setprofile(count)
    try:
        rows = [row for block in read_blocks(source, "data.train", max_row_bytes=4096) for row in block.rows]
    finally:
        sys.setprofile(before)
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
    table = pa.table({"text": ["x" * (1 << 20)] * 2000})
    pq.write_table(table, tmp_path / "rows.parquet", dictionary_pagesize_limit=8 << 20)
    assert (tmp_path / "rows.parquet").stat().st_size < 1 << 20
    found, most = source(str(tmp_path / "rows.parquet")), 0
    del table
    before, count = pa.total_allocated_bytes(), 0
    for block in read_blocks(found, "data.train", max_row_bytes=1 << 20):
        most, count = max(most, pa.total_allocated_bytes() - before), count + len(block.rows)
    assert (count, most < 64 << 20) == (2000, True)


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
