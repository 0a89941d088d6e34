"""Reads answers as JSON: only as a whole, since a program that reads them would fail on any text around it."""

import json
from typing import Any


def json_value(text: str) -> Any:
    """Parse a text that is JSON and nothing else; None: it is not, or it is `null`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def json_object(text: str) -> dict[str, Any] | None:
    """Parse a text that is a JSON object; None: it is none."""
    value = json_value(text)
    return value if isinstance(value, dict) else None


def same_json(one: Any, other: Any) -> bool:
    """Return whether two values are equal as JSON: true is not 1, and the order of keys does not count."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
