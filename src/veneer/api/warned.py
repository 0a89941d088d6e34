"""What decorates a run must never cost it."""

import warnings
from collections.abc import Callable


def or_warn(what: str, write: Callable[[], None]) -> None:
    """Write what a result is good without; where that fails, say so and keep the result."""
    try:
        write()
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the adapter
        warnings.warn(
            f"{what} could not be written ({type(error).__name__}: {error}); all else is there",
            RuntimeWarning,
            stacklevel=2,
        )
