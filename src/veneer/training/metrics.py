"""Writes records of logged steps and evaluations to metrics.jsonl; other listeners get the same records."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from veneer.config.files import read_json_lines
from veneer.config.folder import write_text
from veneer.config.notify import notify

# Called with each line of metrics.jsonl: a record of config/records.py.
Listener = Callable[[dict[str, Any]], None]


class MetricsFile:
    """Appends a line of JSON for each record; a run that goes on from a checkpoint drops what came after it.

    Lines that cannot be written are kept and written with a later one: a disk that fails for a moment costs no run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0  # bytes of whole lines in the file
        self._waiting = b""
        self._has_notified = False

    def before(self, done: int, evaluates_again: bool = True) -> list[dict[str, Any]]:
        """Return the records of the first `done` steps.

        Args:
            done: Steps.
            evaluates_again: Whether a run that goes on there evaluates that step again, whose record is left out then.
        """
        return [
            line
            for line in read_metrics(self._path)
            if line["step"] < done or (line["step"] == done and not (evaluates_again and line["kind"] == "eval"))
        ]

    def restart(self, kept: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Keep some of the file's records alone, with which the training goes on; returns them."""
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(self._path, text)
        self._written, self._waiting = len(text.encode()), b""
        return kept

    def append(self, record: dict[str, Any]) -> None:
        """Write a line; a notice says once that it could not be written."""
        self._waiting += json.dumps(record).encode() + b"\n"
        try:
            with self._path.open("ab") as file:
                file.truncate(self._written)  # what an error left of a line
                file.write(self._waiting)
        except OSError as error:
            if not self._has_notified:
                notify(
                    f"{self._path}: cannot be written ({error.strerror}); its lines are written later",
                    where=str(self._path),
                )
            self._has_notified = True
        else:
            self._written, self._waiting = self._written + len(self._waiting), b""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all records of a metrics.jsonl; a last line that a crash cut short is left out.

    Raises:
        UserError: Another line is damaged.
    """
    return read_json_lines(path, "step", "kind", is_appended=True) if path.exists() else []
