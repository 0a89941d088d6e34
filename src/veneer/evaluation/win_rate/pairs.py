"""Pairs of answers to the same rows, from files that an evaluation wrote: nothing is generated again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError
from veneer.config.files import read_json_lines

FIX = "evaluate the run first, or name a file of answers that `veneer evaluate` wrote"


@dataclass(frozen=True)
class Pair:
    """Two answers to one row.

    Attributes:
        place: place of the row in its file.
        prompt: last message of the user.
        first, second: answers; the win rate is that of the second.
        reference: right answer of the row.
        group: group that the row shares with others; None: it stands alone.
    """

    place: str
    prompt: str
    first: str
    second: str
    reference: str = ""
    group: str | None = None

    @property
    def id(self) -> str:
        """A hash of the row and both answers, and of all else that a judge may be shown."""
        return digest([self.place, self.prompt, self.first, self.second, self.reference])

    @property
    def is_same(self) -> bool:
        """Whether both answers are the same text: a tie that nobody needs to be asked about."""
        return self.first.strip() == self.second.strip()


def read_pairs(
    samples: Path, answers: tuple[str, str], against: Path | None = None, limit: int | None = None
) -> list[Pair]:
    """Read both answers to each row.

    Args:
        samples: File of answers, a line a row, as samples.jsonl.
        answers: Keys of the first and of the second answer in a line.
        against: File that the first answers are read from; None: `samples` itself.
        limit: Largest number of rows, the first ones; None: all.

    Raises:
        UserError: A file cannot be read or lacks an answer, or fewer than two rows are in both files.
    """
    lines = _lines(samples, answers[1])
    others = {_row(line): line for line in _lines(against or samples, answers[0])}
    pairs = [
        Pair(line["place"], line["prompt"], others[row][answers[0]], line[answers[1]], line["reference"], line["group"])
        for line in lines
        if (row := _row(line)) in others
    ][:limit]
    if len(pairs) < 2:
        both = f" and {against}" if against else ""
        raise UserError(f"{samples}{both}: {len(pairs)} rows with both answers; at least 2 are needed", FIX)
    return pairs


def digest(value: Any) -> str:
    """Return a short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """Return a hash of all rows and answers."""
    return digest([pair.id for pair in pairs])


def _lines(file: Path, answer: str) -> list[dict[str, Any]]:
    lines = [{"reference": "", "group": None} | line for line in read_json_lines(file, "place", "prompt", fix=FIX)]
    for number, line in enumerate(lines, 1):
        if answer not in line:
            known = ", ".join(key for key in ("base", "tuned", "base_with_examples", "exported") if key in line)
            raise UserError(f"{file}:{number}: holds no answer `{answer}`", f"--answers takes two of: {known}")
        if not all(isinstance(line[key], str) for key in ("place", "prompt", "reference", answer)):
            raise UserError(f"{file}:{number}: damaged: an answer is no text", FIX)
    return lines


def _row(line: dict[str, Any]) -> tuple[str, str]:
    return line["place"], line["prompt"]
