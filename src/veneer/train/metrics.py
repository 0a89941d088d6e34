"""What is told of each step, and to whom: the file metrics.jsonl, a progress bar, a program's own listener."""

import json
from pathlib import Path
from typing import Any, Protocol

from veneer.config.files import read_json_lines
from veneer.config.folder import write_text


class Listener(Protocol):
    """Hears of a run's progress. Records are the lines of metrics.jsonl."""

    def on_start(self, steps: int, done: int) -> None:
        """Training begins (or goes on after `done` steps)."""

    def on_record(self, record: dict[str, Any]) -> None:
        """A logged step (`kind: train`) or an evaluation (`kind: eval`)."""

    def on_end(self) -> None:
        """Training has ended, well or not."""


class MetricsFile:
    """Appends a line of JSON for each record; a resumed run first drops what came after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_start(self, steps: int, done: int) -> None:
        # A run resumed after its last step evaluates again.
        kept = [
            line
            for line in read_metrics(self._path)
            if line["step"] < done or (line["step"] == done and (line["kind"] == "train" or done < steps))
        ]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_record(self, record: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def on_end(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; a last line that a crash cut short is left out.

    Raises:
        UserError: Another line is damaged.
    """
    return read_json_lines(path, "step", "kind", is_appended=True) if path.exists() else []
