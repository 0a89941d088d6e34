"""Accounts for every row and token of the data. The ledger is written beside the run and ships with the adapter."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Fates of a row; each has exactly one.
FATES = ("used", "unreadable", "empty", "duplicate", "overlong", "refused")
PERCENTILES = (50, 90, 95, 99)
BARS = 24  # of the histogram


@dataclass
class Ledger:
    """Counts over all rows read, those of held-out files among them. Token counts are of the training rows.

    read = used + unreadable + empty + duplicate + overlong + refused, and used = training + validation.

    Attributes:
        formats: Format and reason of each file.
        rows: Counts by fate, and of training and validation rows.
        notes: Counts of what is worth knowing of rows that are among those counted above.
        lengths: Tokens of a row to the number of such rows, before overlong ones were left out.
        sha256: Fingerprints of either part's tokens and weights, in order.
        pack: number, fill and lengths of the packed training sequences.
        overlap: Held-out rows that share a passage with training rows, and their places.
    """

    formats: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    personal: Counter[str] = field(default_factory=Counter)
    tokens: dict[str, int] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    pack: dict[str, float] = field(default_factory=dict)
    overlap: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    was_cached: bool = False

    def add(self, account: dict[str, Any]) -> None:
        """Count in what a corpus knows of its rows."""
        for fate, count in account["fates"].items():
            self.rows[fate] += count
        self.notes.update(account["notes"])
        self.personal.update(account["personal"])
        self.lengths.update(dict(account["lengths"]))
        self.problems += [tuple(problem) for problem in account["problems"]]

    def move(self, fate: str, count: int) -> None:
        """Rows that were counted as used have another fate."""
        self.rows["used"] -= count
        self.rows[fate] += count

    @property
    def read(self) -> int:
        return sum(self.rows[fate] for fate in FATES)

    def as_dict(self) -> dict[str, Any]:
        """The ledger as `ledger.json` has it."""
        return {
            "format": ", ".join(sorted({known["format"] for known in self.formats.values()})),
            "files": self.formats,
            "rows": {"read": self.read} | {name: self.rows[name] for name in (*FATES, "training", "validation")},
            "notes": dict(sorted(self.notes.items())),
            "personal": dict(sorted(self.personal.items())),
            "tokens": self.tokens,
            "lengths": length_summary(self.lengths),
            "packing": self.pack,
            "overlap": self.overlap,
            "problems": [{"place": place, "fate": fate, "reason": reason} for place, fate, reason in self.problems],
            "warnings": self.warnings,
            "sha256": self.sha256,
            "seconds": round(self.seconds, 3),
            "cached": self.was_cached,
        }


def length_summary(lengths: Counter[int]) -> dict[str, Any]:
    """Percentiles of the rows' lengths in tokens, and a histogram."""
    if not lengths:
        return {"percentiles": {}, "histogram": []}
    values = np.array(sorted(lengths))
    counts = np.array([lengths[int(value)] for value in values])
    ranks = np.cumsum(counts)
    percentiles = {f"p{p}": int(values[np.searchsorted(ranks, np.ceil(p / 100 * ranks[-1]))]) for p in PERCENTILES}
    # Equal bars up to the 99th percentile, and one for the few rows beyond.
    width = -(-(percentiles["p99"] + 1) // (BARS - 1))
    bars = np.bincount(np.minimum(values // width, BARS - 1), weights=counts).astype(int)
    ends = [(n + 1) * width for n in range(BARS - 1)] + [int(values[-1]) + 1]
    return {
        "percentiles": percentiles | {"max": int(values[-1])},
        "histogram": [{"from": n * width, "to": ends[n], "rows": int(bar)} for n, bar in enumerate(bars)],
    }
