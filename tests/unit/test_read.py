"""Every kind of file gives its rows, each with its place; what is damaged is told."""

import csv
import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.row_files import (
    PACK,
    RECORDS,
    TEXTS,
    blocks,
    lines,
    places,
    reasons,
    refused,
    rows,
    save_arrow_file,
    save_arrow_stream,
    save_folder,
    save_parquet,
    save_splits,
    separated,
    source,
    written,
)
from veneer.config import UserError
from veneer.data.sources.block import BYTES, Unreadable
from veneer.data.sources.find import find_sources
from veneer.data.sources.read import parse, read_blocks

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


def test_the_index_of_a_frame_is_named(tmp_path: Path) -> None:
    told = refused(written(tmp_path / "rows.csv", ",a\n0,b\n"))
    assert "column 1 of 2 has no name; is it the index of a pandas frame?" in told
