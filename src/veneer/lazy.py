"""Packages whose names are imported when they are first used, so that importing one costs nothing.

A command that is refused for a wrong path answers at once then, and one module of a package can be used without the
rest of it. Only the standard library is imported here.
"""

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def import_on_use(package: str, homes: Mapping[str, str]) -> None:
    """Let a package give names of its modules; called at the end of its `__init__.py`.

    A name that is a module of the package too (`veneer.data.prepare`) stays the function: importing a
    module sets an attribute on its package, and for these names the package declines.

    Args:
        package: Its `__name__`.
        homes: Each name, and the module that defines it.
    """

    class LazyPackage(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name in homes:
                return getattr(importlib.import_module(homes[name]), name)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in homes and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    sys.modules[package].__class__ = LazyPackage
