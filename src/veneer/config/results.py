"""What a check found, for `veneer verify`, for a certificate and for what a serving runtime takes.

A check measures one thing and has a limit for it, so that a person sees how close it was, and a program needs to read
no sentence. A check that does not apply to a run has passed and has no value; `detail` says why.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        id: name for programs; docs/verify.md and docs/release.md list them
        passed: whether it passed; true if it does not apply
        value: measured value, a number or words; None: it does not apply, or is not finite
        limit: limit of the value
        name: name of the measured quantity, for display
        detail: reason why it failed or does not apply, worst case, or method of measurement
        bound: whether the limit is the largest or the smallest number that passes (at most, at least)
        unit: `share`: value and limit are shown in percent; empty: as they are
    """

    id: str
    passed: bool
    value: float | str | None = None
    limit: float | str | None = None
    name: str = ""
    detail: str = ""
    bound: str = "at most"
    unit: str = ""

    @classmethod
    def at_most(cls, id: str, value: float, limit: float, name: str, detail: str = "") -> "Check":
        """Check that a number does not exceed a limit; NaN and infinity fail and have no value.

        Args:
            id, value, limit, name: attributes of the class.
            detail: detail if the check fails.
        """
        passed = value <= limit
        return cls(id, passed, value if math.isfinite(value) else None, limit, name, "" if passed else detail)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def value_text(check: dict[str, Any]) -> str:
    """The value of a check (as `Check.as_dict` gives it) for a person; empty where it does not apply."""
    value = check["value"]
    if isinstance(value, str | None):
        return value or ("" if check["passed"] else "not finite")
    return f"{value:.1%}" if check["unit"] == "share" else f"{value:.4g}"


def limit_text(check: dict[str, Any]) -> str:
    """The limit of a check for a person, behind its sign where it is a number; older certificates say no bound."""
    limit = check["limit"]
    if isinstance(limit, str | None):
        return limit or ""
    sign = {"at least": "≥ ", "at most": "≤ "}.get(check.get("bound", ""), "")
    return f"{sign}{limit:.0%}" if check["unit"] == "share" else f"{sign}{limit:.4g}"


def metric_name(name: str) -> str:
    """Return a metric's name as it is shown: words with spaces; those of tasks (task.metric) as gates name them."""
    shown = name.removeprefix("field.")
    return shown if "." in shown else shown.replace("_", " ")
