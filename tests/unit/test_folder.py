"""Files appear whole or not at all, and a folder that cannot be used is refused before anything is written."""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import veneer
from tests.support.runs import tiny_run, write_rows
from veneer.config import RunFolder, UserError
from veneer.config.cache import cached
from veneer.config.folder import whole_folder, write_text


@pytest.fixture(params=[0o077, 0o022, 0o002], ids=["077", "022", "002"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """Permissions of a folder and of all that is in it."""
    return {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in (folder, *folder.rglob("*"))}


def assert_follow(umask: int, folder: Path) -> None:
    found = modes(folder)
    assert found == {name: oct((0o777 if Path(name).is_dir() else 0o666) & ~umask) for name in found}


def test_files_and_folders_follow_the_umask(umask: int, tmp_path: Path) -> None:
    for _ in range(2):  # a new one, and one that takes the place of another
        write_text(tmp_path / "made" / "a.txt", "a")
        with whole_folder(tmp_path / "made" / "b") as unfinished:
            (unfinished / "inner").mkdir()
            save_file({"a": torch.zeros(2)}, unfinished / "inner" / "a.safetensors")  # writes 0600 whatever the umask
            write_text(unfinished / "c.txt", "c")
    assert_follow(umask, tmp_path / "made")


def test_a_run_and_what_ships_of_it_follow_the_umask(
    umask: int,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tiny_model()
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "made" / "cache"))
    made = tiny_run(
        base,
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "made" / "run",
        data={"validation": 2},
        train={"max_steps": 1, "save_steps": 1},
    )
    veneer.train(made)
    veneer.evaluate(tmp_path / "made" / "run")
    veneer.merge(str(tmp_path / "made" / "run"), tmp_path / "made" / "merged")
    veneer.export(str(tmp_path / "made" / "run"), tmp_path / "made" / "lora", adapter_only=True)
    assert list((tmp_path / "made" / "run" / "checkpoints").iterdir())
    assert_follow(umask, tmp_path / "made")


def test_an_entry_of_the_cache_follows_the_umask(umask: int, empty_cache: Path) -> None:
    cached("models/a", lambda folder: write_text(folder / "a.txt", "a"))
    assert_follow(umask, empty_cache)


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
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


def test_what_a_killed_process_left_goes_and_what_a_living_one_makes_stays(tmp_path: Path) -> None:
    dead = [tmp_path / f".a.{'0' * 11}{n}" for n in range(2)]
    others = [tmp_path / name for name in (".a.old", ".ab.0123456789ab", ".a.0123456789xy")]
    for folder in (*dead, *others):
        folder.mkdir()
        (folder / "half").touch()
    with whole_folder(tmp_path / "a") as living:
        assert not any(folder.exists() for folder in dead)
        with whole_folder(tmp_path / "a") as second:
            (second / "x").write_text("second")
        assert living.exists()
        (living / "x").write_text("first")
    assert (tmp_path / "a" / "x").read_text() == "first"
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", *others])


def test_names_of_any_length_that_the_disk_takes_are_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        write_text(tmp_path / name, "text")
        (tmp_path / name).unlink()
        with whole_folder(tmp_path / name) as unfinished:
            write_text(unfinished / name, "text")
        assert (tmp_path / name / name).read_text() == "text"


def test_names_are_flushed_to_disk_after_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    flush = os.fsync

    def recorded(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        flush(handle)

    monkeypatch.setattr("os.fsync", recorded)
    with whole_folder(tmp_path / "new" / "a") as unfinished:
        (unfinished / "x").write_text("x")
    assert flushed == [tmp_path, unfinished / "x", unfinished, tmp_path / "new"]
    flushed.clear()
    write_text(tmp_path / "new" / "b", "b")
    assert [path.parent for path in flushed] == [tmp_path / "new", tmp_path]
