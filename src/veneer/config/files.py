"""Reads files that anyone may have written: regular files alone, of bounded size, and damage is one message.

Each reader of a run's, an adapter's or a model's own files goes through here, so that a cut, emptied or overwritten
file is named in one `UserError` and no parser's own exception reaches a user. `visible` is the other half: text from
such files as it can be shown.
"""

import contextlib
import errno
import hashlib
import json
import re
import stat
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from veneer.config.errors import Interrupted, JobError, UserError

LARGEST_BYTES = 256 * 2**20  # of a file of settings, records or facts; weights and data have readers of their own
RESTORE = "restore the file, or make it again"
# What moves a cursor, starts a command of the terminal, reverses the order of a line or is half a character.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text with its control characters escaped (`\\x1b`), so that a terminal or a page shows them and does nothing.

    Line ends and tabs stay. Characters that reorder a line and halves of surrogate pairs are escaped too.
    """
    return _UNSEEN.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def read_text(path: Path, most_bytes: int = LARGEST_BYTES, fix: str = RESTORE) -> str:
    """A regular file's text.

    Raises:
        UserError: It is missing, a pipe or a device, larger than `most_bytes`, or not UTF-8.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
            raise UserError(f"{path}: not a file but {what}, which is not read", "name a file")
        if found.st_size > most_bytes:
            raise UserError(f"{path}: {found.st_size:,} bytes, and at most {most_bytes:,} are read", fix)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", fix) from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as text ({reason(error)})", fix) from None


def read_json(path: Path, *keys: str, fix: str = RESTORE) -> dict[str, Any]:
    """The JSON object in a file, which holds `keys`.

    Raises:
        UserError: It cannot be read, is no JSON object, or lacks a key.
    """
    return _object(read_text(path, fix=fix), str(path), keys, fix)


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file. Raises as `read_json`."""
    return read_json(path, fix="fetch it again, or delete it if it is not needed") if path.is_file() else {}


def read_json_lines(path: Path, *keys: str, fix: str = RESTORE, is_appended: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line, each of which holds `keys`.

    Args:
        path, keys: The file and the keys.
        fix: advice on damage.
        is_appended: Lines were added to it one by one, so that a crash may have cut the last one, which is left out.

    Raises:
        UserError: It cannot be read, or a line is no such object.
    """
    lines = read_text(path, fix=fix).split("\n")
    if is_appended:
        lines.pop()  # empty where the last line is whole
    return [_object(line, f"{path}:{n}", keys, fix) for n, line in enumerate(lines, 1) if line.strip()]


def _object(text: str, where: str, keys: tuple[str, ...], fix: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged: not JSON ({reason(error)})", fix) from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: damaged: not a JSON object", fix)
    if missing := [key for key in keys if key not in found]:
        raise UserError(f"{where}: damaged: it lacks `{missing[0]}`", fix)
    return found


def packaged_table(package: str, name: str) -> Any:
    """The values of a YAML file that lies beside the code of a package."""
    text = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def own_files(folder: Path, *patterns: str) -> list[Path]:
    """Files of a model or an adapter, by pattern, that may be written into what ships.

    The files of a hub's cache are links into the cache of the same model, and are its own.

    Raises:
        UserError: One is a link that leads elsewhere: what it leads to may be anything of this machine.
    """
    whole = folder.resolve()
    homes = [whole, whole.parents[1] / "blobs"] if whole.parent.name == "snapshots" else [whole]
    found = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    for path in found:
        if path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes):
            raise UserError(
                f"{path}: a link that leads out of its folder, to {path.resolve()}, which does not ship",
                "put the file itself there, or delete the link",
            )
    return found


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def reading(what: object, fix: str = RESTORE) -> Iterator[None]:
    """Turn all that a damaged file makes of the code that reads it into one UserError that names it.

    Parsers of other libraries raise anything on damage, panics of native code among it. Errors that say enough already,
    a full disk and too little memory pass.

    Args:
        what: name of what is read, as the message begins.
        fix: advice on it.
    """
    try:
        yield
    except (UserError, JobError, Interrupted, MemoryError):
        raise
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        raise UserError(f"{what}: {reason(error)}", fix) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of native code in Rust; it is no Exception
            raise
        raise UserError(f"{what}: damaged: {reason(error)}", fix) from None


def reason(error: BaseException) -> str:
    """The message of an error, in one line and without its class."""
    if isinstance(error, KeyError) and error.args:
        return f"it lacks {error.args[0]!r}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "it is not what its name says"
