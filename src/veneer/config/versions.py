"""The versions of installed libraries, each asked once: a version is a file of metadata to parse, which takes 3 ms."""

from functools import cache
from importlib import metadata


@cache
def version_of(library: str) -> str:
    """Return the version of an installed library; no process sees it change."""
    return metadata.version(library)
