"""The ledger: what became of every row and token of the data. Written beside the run and shipped with the adapter."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """Counts over all rows read. `duplicate` rows are among those used; every other count is a row's one fate.

    read = used + empty + overlong, and used = training + validation. `sha256` has fingerprints of the tokens and
    targets of either part, in order.
    """

    format: str = ""
    reason: str = ""
    read: int = 0
    used: int = 0
    empty: int = 0
    duplicate: int = 0
    overlong: int = 0
    training: int = 0
    validation: int = 0
    tokens_total: int = 0
    tokens_trained: int = 0
    tokens_end_of_turn: int = 0
    longest: int = 0
    warnings: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The ledger as `ledger.json` has it."""
        return {
            "format": self.format,
            "reason": self.reason,
            "rows": {
                "read": self.read,
                "used": self.used,
                # Rows that cannot be read or rendered end the run, so a ledger that exists has none.
                "unreadable": 0,
                "empty": self.empty,
                "duplicate": self.duplicate,
                "overlong": self.overlong,
                "refused": 0,
                "training": self.training,
                "validation": self.validation,
            },
            "tokens": {
                "total": self.tokens_total,
                "trained": self.tokens_trained,
                "end_of_turn": self.tokens_end_of_turn,
                "longest_row": self.longest,
            },
            "warnings": self.warnings,
            "sha256": self.sha256,
        }
