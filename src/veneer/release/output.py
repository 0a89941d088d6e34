"""A folder that is to be written: it is checked in full before any work, so that what fails fails at once.

The folder appears whole or not at all: it is made under another name beside its place and renamed. So its parent must
be writable, and it must not be a folder that cannot be renamed over: a mount, or the one the user stands in.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from veneer.config import UserError


def require_known(option: str, value: str, known: Iterable[str]) -> None:
    """Raises UserError for a value that is not among those an option takes."""
    if value not in known:
        raise UserError(f"{option} {value}: not known", f"write one of {', '.join(known)}")


def require_free(out: Path) -> None:
    """Raises UserError if a folder to be made is a file or holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is a file" if not out.is_dir() else "is not empty"
        raise UserError(f"--out {out}: {what}", "name a new folder with --out")


def require_space(out: Path, needed: int) -> None:
    """Raises UserError if the disk has no room for what is to be written, or cannot be written."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is a file", "name another folder with --out")
    free = shutil.disk_usage(parent).free
    if free < 1.02 * needed:
        raise UserError(
            f"--out {out}: {free / 2**30:,.2f} GiB free, {1.02 * needed / 2**30:,.2f} GiB needed",
            "free space, or name a folder on another disk with --out",
        )
