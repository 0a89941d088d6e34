"""Files appear whole or not at all, and a folder that cannot be used is refused before anything is written."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from veneer.config import RunFolder, UserError
from veneer.config.folder import whole_folder, write_text


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a") as unfinished:
        (unfinished / "x").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a") as unfinished:
        (unfinished / "x").write_text("new")
        raise RuntimeError
    assert (tmp_path / "a" / "x").read_text() == "old"
    with whole_folder(tmp_path / "a") as unfinished:
        (unfinished / "y").write_text("new")
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["y"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    rename = os.replace

    def busy(source: Path, target: Path) -> None:
        if target == tmp_path / "a" and (source / "y").exists():
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr("os.replace", busy)
    with pytest.raises(OSError, match="busy"), whole_folder(tmp_path / "a") as unfinished:
        (unfinished / "y").write_text("new")
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    # /sys refuses new folders even to root.
    with pytest.raises(UserError, match=r"train\.output_dir = /sys/veneer/run: cannot be written"):
        RunFolder(Path("/sys/veneer/run")).require_writable(1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").require_writable(1)
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file").require_free()


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_folder_without_space_is_refused_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10 * 2**20, 9 * 2**20, 2**20))
    with pytest.raises(UserError, match="1 MiB free, the run needs about 2 MiB") as caught:
        RunFolder(tmp_path / "runs" / "new").require_writable(2 * 2**20)
    assert "lower train.save_total_limit" in str(caught.value)
    assert not list(tmp_path.iterdir())
