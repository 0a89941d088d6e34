"""Turns values within tool calls and definitions into those of JSON; what JSON has no form for is refused.

Parquet and Arrow give dates, decimals and bytes where JSON has none, and Python's reader of JSON takes NaN and half an
emoji. A date becomes its ISO text, a decimal a number, bytes their UTF-8 text; all else is the row's fault.
"""

from datetime import date, datetime, time
from decimal import Decimal
from math import isfinite
from typing import Any

from veneer.data.conversation import BadRowError

DEEPEST = 100  # levels of nesting


def check_text(text: str, what: str) -> None:
    """Raises BadRowError for a text that cannot be right; `what` names its field."""
    if "\0" in text:
        raise BadRowError(f"`{what}` holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"`{what}` holds half a character (a lone surrogate, as of a cut emoji)") from None


def as_json(value: Any, what: str, depth: int = 0) -> Any:
    """A value of JSON's own types.

    Args:
        value: value that a row holds.
        what: name of its field, for messages.
        depth: Levels above it.

    Raises:
        BadRowError: It holds what JSON cannot say.
    """
    if depth > DEEPEST:
        raise BadRowError(f"`{what}` is nested deeper than {DEEPEST} levels")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise BadRowError(f"`{what}` holds bytes that are no UTF-8 text") from None
    elif isinstance(value, date | datetime | time):
        value = value.isoformat()
    elif isinstance(value, Decimal) and value.is_finite():
        value = int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, str):
        check_text(value, what)
        return value
    if isinstance(value, dict):
        return {_key(key, what): as_json(inner, what, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner, what, depth + 1) for inner in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and isfinite(value)):
        return value
    shown = value if isinstance(value, float | Decimal) else f"a {type(value).__name__}"
    raise BadRowError(f"`{what}` holds {shown}, which is no JSON; write null, or leave it out")


def _key(key: Any, what: str) -> str:
    if not isinstance(key, str):
        raise BadRowError(f"`{what}` has the key {key!r}, which is no text")
    check_text(key, what)
    return key
