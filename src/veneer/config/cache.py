"""Keeps entries in the user's cache folder; the first process that needs one makes it, whole or not at all."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from veneer.config import UserError
from veneer.config.folder import whole_folder
from veneer.config.notify import notify


def cache_folder() -> Path:
    """$VENEER_CACHE, else $XDG_CACHE_HOME/veneer, else ~/.cache/veneer."""
    if given := os.environ.get("VENEER_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


SILENT_SECONDS = 2.0  # of waiting for another process, before a person hears of it


def cached(entry: str, make: Callable[[Path], None], is_sound: Callable[[Path], bool] = lambda folder: True) -> Path:
    """The folder of a cache entry; `make` fills it if it is not there yet, or where `is_sound` finds it damaged.

    Other processes wait for the one that makes it, and say so. An entry appears whole or not at all.
    """
    folder = cache_folder() / entry
    if folder.is_dir() and is_sound(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _held(folder.parent / f".{folder.name}.lock", folder):
            if not folder.is_dir() or not is_sound(folder):
                with whole_folder(folder) as unfinished:
                    make(unfinished)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror or error})",
            "set VENEER_CACHE to a folder with space that you may write to",
        ) from error
    return folder


@contextmanager
def _held(file: Path, folder: Path) -> Iterator[None]:
    """Hold a lock file; a notice says what is waited for where that takes a while."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=SILENT_SECONDS)
    except Timeout:
        notify(f"waiting for another process, which makes {folder} (it holds {file})", "info", str(folder))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
