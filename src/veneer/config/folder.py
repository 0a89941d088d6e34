"""Writes files and folders whole or not at all.

Every file is written under a temporary name, flushed to disk and renamed, so that a crash or a full disk leaves
the old file or none, never half of one. Folders are made the same way. A name is on the disk once the folder that it
stands in was flushed as well, and so that is done too.

A process that is killed leaves its temporary folder behind. It is told from one in use by a lock (flock) that the
kernel takes away with the process, and not by an age or a process number, which another machine may use as well.

Permissions are those that the umask leaves, as of any file a program creates: `tempfile` and safetensors would make
them private to the user, which colleagues and a server's account could not read, and a fixed mode would open what a
umask of 077 closes. The umask itself is never read or set, since that would change it for the whole process.
"""

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.config.paths import LONGEST_NAME

if os.name != "nt":
    import fcntl

_RANDOM = 12  # characters that tell temporary names apart


def as_os_error(error: Exception) -> OSError | None:
    """Return the error of the system that kept something from being written; None: it is another one.

    Libraries in other languages raise classes of their own, and name its number in their text.
    """
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])))


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, and have their names on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _flush_folder(folder.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; makes its folder."""
    # Names of files need not be UTF-8; in JSON and YAML what is put for such a byte is its escape.
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; makes its folder."""
    make_folder(path.parent)
    temporary = _unused_beside(path)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there; a folder under another name first, so that no half of it is left."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.startswith("."):  # a temporary one is nothing to anybody, and keeps its name
            path = path.replace(_unused_beside(path))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, keep: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    An existing `path` is replaced. What a process that was killed left of `path` is deleted.

    Args:
        path: folder to be made.
        keep: whether the folder stays; False: it vanishes in any case.
    """
    make_folder(path.parent)
    clear_dead(path)
    temporary, claim = _make_claimed(path)
    file_mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666  # of a folder just made: what the umask leaves
    try:
        yield temporary
        if keep:
            _flush_files(temporary, file_mode)
            _put_in_place(temporary, path)
            _flush_folder(path.parent)
        else:
            shutil.rmtree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if claim is not None:
            os.close(claim)


def clear_dead(path: Path) -> None:
    """Delete the temporary folders that killed processes left of `path`; those of living ones are locked."""
    for left in path.parent.glob(f".{glob.escape(_short(path.name))}.{'[0-9a-f]' * _RANDOM}"):
        claim = _claim(left, wait=False)
        if claim is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(claim)


def _make_claimed(path: Path) -> tuple[Path, int | None]:
    """A new temporary folder beside `path`, and the descriptor that holds its lock, where it can be locked."""
    while True:
        temporary = _unused_beside(path)
        temporary.mkdir()
        claim = _claim(temporary, wait=True)
        if temporary.exists():  # else another process took it for abandoned, before it was locked
            return temporary, claim
        if claim is not None:
            os.close(claim)


def _claim(folder: Path, wait: bool) -> int | None:
    """Lock a folder until the descriptor is closed; None: another process has it, or it cannot be locked here."""
    if os.name == "nt":
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _flush_files(folder: Path, file_mode: int) -> None:
    """Have all that is in a folder on the disk, files with the permissions given."""
    for entry in (*folder.rglob("*"), folder):
        if entry.is_file():
            entry.chmod(file_mode)
            with entry.open("rb") as handle:
                os.fsync(handle.fileno())
        elif entry.is_dir():
            _flush_folder(entry)


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that."""
    if os.name == "nt":  # folders are no files there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that know no such thing
            raise
    finally:
        os.close(handle)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a folder; one that has the name already is deleted, or keeps it where the renaming fails."""
    if not path.exists():
        os.replace(temporary, path)
        return
    discarded = _unused_beside(path)
    discarded.mkdir()
    try:
        os.replace(path, discarded / path.name)
        os.replace(temporary, path)
    except BaseException:
        if (discarded / path.name).exists():  # the old one goes back
            os.replace(discarded / path.name, path)
        discarded.rmdir()
        raise
    shutil.rmtree(discarded)


def _unused_beside(path: Path) -> Path:
    """A hidden name in the same folder, so that a rename to `path` stays on one disk."""
    return path.with_name(f".{_short(path.name)}.{secrets.token_hex(_RANDOM // 2)}")


def _short(name: str) -> str:
    """A name cut so that a temporary one made of it is not too long."""
    return os.fsdecode(os.fsencode(name)[: LONGEST_NAME - _RANDOM - 2])
