"""What a setting names is found and known for what it is: files, globs, folders, and datasets of the hub."""

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.support.row_files import PACK, RECORDS, lines, places, reasons, refused, rows, save_folder, source, written
from veneer.config import UserError
from veneer.data.sources.find import find_sources
from veneer.data.sources.read import read_blocks

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
