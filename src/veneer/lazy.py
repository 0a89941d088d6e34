"""Packages whose names are imported when they are first used, so that importing one costs nothing.

A command that is refused for a wrong path answers at once then, and one module of a package can be used without the
rest of it. Only the standard library is imported here.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def import_on_use(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that gives names of its modules.

    Args:
        package: Its `__name__`.
        homes: Each name, and the module that defines it. No name is that of a module of the package, which would take
            its place as soon as it is imported.
    """

    def find(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
