"""What is told of each step, and to whom: the file metrics.jsonl, a progress bar, a program's own listener."""

import json
import warnings
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from veneer.config.files import read_json_lines
from veneer.config.folder import write_text


@runtime_checkable
class Listener(Protocol):
    """Hears of a run's progress. Records are the lines of metrics.jsonl."""

    def on_start(self, steps: int, done: int) -> None:
        """Training begins (or goes on after `done` steps)."""

    def on_record(self, record: dict[str, Any]) -> None:
        """A logged step (`kind: train`) or an evaluation (`kind: eval`)."""

    def on_end(self) -> None:
        """Training has ended, well or not."""


class MetricsFile:
    """Appends a line of JSON for each record; a resumed run first drops what came after its checkpoint.

    Lines that cannot be written are kept and written with a later one: a disk that fails for a moment costs no run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0  # bytes of whole lines in the file
        self._waiting = b""
        self._has_told = False

    def on_start(self, steps: int, done: int) -> None:
        # The evaluation of a checkpoint's step comes after it, and so is made again.
        kept = [
            line
            for line in read_metrics(self._path)
            if line["step"] < done or (line["step"] == done and line["kind"] == "train")
        ]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(self._path, text)
        self._written = len(text.encode())

    def on_record(self, record: dict[str, Any]) -> None:
        self._waiting += json.dumps(record).encode() + b"\n"
        try:
            with self._path.open("ab") as file:
                file.truncate(self._written)  # what an error left of a line
                file.write(self._waiting)
        except OSError as error:
            if not self._has_told:
                warnings.warn(
                    f"{self._path}: cannot be written ({error.strerror}); training goes on, and writes its lines later",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._has_told = True
        else:
            self._written, self._waiting = self._written + len(self._waiting), b""

    def on_end(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; a last line that a crash cut short is left out.

    Raises:
        UserError: Another line is damaged.
    """
    return read_json_lines(path, "step", "kind", is_appended=True) if path.exists() else []
