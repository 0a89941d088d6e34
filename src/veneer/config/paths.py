"""What no file system takes as a path, refused at once and not after hours, by whichever call fails first."""

import os

from veneer.config.errors import UserError

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux and nearly every file system


def fault_of(path: str) -> str | None:
    """What is wrong with a path, in words; None: nothing that can be seen without looking for it."""
    if "\0" in path:
        return "holds a NUL character, which no path may"
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        return "holds characters that cannot stand in a path"
    longest = max(map(len, encoded.split(b"/")))
    if longest > LONGEST_NAME:
        return f"a name in it has {longest} bytes, at most {LONGEST_NAME} are allowed"
    if len(encoded) > LONGEST_PATH:
        return f"has {len(encoded)} bytes, at most {LONGEST_PATH} are allowed"
    return None


def require_path(path: str, setting: str) -> None:
    """Raises UserError for what cannot be a path.

    Args:
        path: value of the setting.
        setting: name of the setting, for messages.
    """
    if (fault := fault_of(path)) is not None:
        shown = path if len(path) <= 60 else path[:57] + "..."
        raise UserError(f"{setting} = {shown!r}: {fault}", "name a shorter path, in ordinary characters")
