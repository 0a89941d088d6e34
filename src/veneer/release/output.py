"""Checks the folder that is to be written before any work, so that an error comes at once.

The folder appears whole or not at all: it is made under another name beside its place and renamed. So its parent must
be writable, and it must not be a folder that cannot be renamed over: a mount, or the one the user stands in.
"""

import os
import shutil
import tempfile
from pathlib import Path

from veneer.config import UserError
from veneer.config.folder import clear_dead
from veneer.config.paths import require_path


def require_free(out: Path) -> None:
    """Raise UserError if a folder to be made is a file, holds anything, or cannot be put in its place by a rename."""
    require_path(str(out), "--out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is a file" if not out.is_dir() else "is not empty"
        raise UserError(f"--out {out}: {what}", "name a new folder with --out")
    why = None
    if out.is_symlink():
        why = "a link"
    elif out.is_dir() and out.samefile("."):
        why = "the folder you are in"
    elif os.path.ismount(out):
        why = "a mount"
    if why is not None:
        raise UserError(f"--out {out}: this is {why}, which cannot be replaced by a folder", "name a new folder in it")


def require_space(out: Path, needed: int) -> None:
    """Raise UserError if the disk has no room for what is to be written, or cannot be written. Leaves nothing."""
    clear_dead(out)
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is a file", "name another folder with --out")
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix="."):
            pass
    except OSError as error:
        raise UserError(
            f"--out {out}: {parent} cannot be written ({error.strerror})", "name a folder you may write to with --out"
        ) from None
    free = shutil.disk_usage(parent).free
    if free < 1.02 * needed:
        raise UserError(
            f"--out {out}: {free / 2**20:,.1f} MiB free, {1.02 * needed / 2**20:,.1f} MiB needed",
            "free space, or name a folder on another disk with --out",
        )
