"""Reads what a run's folder holds for its page, whatever state the run is in.

A page must not fail over one bad line: lines of metrics.jsonl and events.jsonl that are no records, and files that are
damaged, are left out and named in `damaged`, which the page shows. Only a folder that holds no run is refused.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError
from veneer.config.files import read_json, read_json_lines, read_text
from veneer.config.load import yaml_values
from veneer.config.run_folder import RunFolder
from veneer.config.run_state import RunState, run_state

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell of it; those that are not there are empty.

    Attributes:
        path: folder of the run.
        state: state, as `veneer runs` shows it.
        settings_text, settings: run.yaml, as it is and as values.
        plan, ledger, environment, evaluation, certificate: the files of these names.
        training: entry `training` of the passport.
        samples: lines of samples.jsonl.
        records: records of metrics.jsonl, the ones in order.
        events: lines of events.jsonl.
        damaged: sentences on files and lines that could not be read.
    """

    path: Path
    state: RunState
    settings_text: str
    settings: dict[str, Any]
    plan: dict[str, Any]
    ledger: dict[str, Any]
    environment: dict[str, Any]
    evaluation: dict[str, Any]
    certificate: dict[str, Any]
    training: dict[str, Any]
    samples: list[Record]
    records: list[Record]
    events: list[Record]
    damaged: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @cached_property
    def trained(self) -> list[Record]:
        """Records of logged steps."""
        return [one for one in self.records if one["kind"] == "train"]

    @cached_property
    def held_out(self) -> list[Record]:
        """Records of evaluations."""
        return [one for one in self.records if one["kind"] == "eval"]

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the settings; empty: there is none."""
        found = self.settings.get(name)
        return found if isinstance(found, dict) else {}


def read_run(path: str | Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        UserError: It is no folder, or holds no run that has begun.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such folder"
        raise UserError(f"{path}: {what}", "name the folder of a run, its train.output_dir; `veneer runs` lists them")
    folder = RunFolder(path)
    if not folder.run.is_file():
        raise UserError(
            f"{path}: holds no run, there is no run.yaml", "name the folder of a run; `veneer runs` lists them"
        )
    state, text = run_state(path), read_text(folder.run)
    damaged: list[str] = []

    def table(file: Path) -> dict[str, Any]:
        return _or_empty(lambda: read_json(file), damaged) if file.exists() else {}

    passport = table(folder.delivered / "passport.json")
    return RunFiles(
        path=path,
        state=state,
        settings_text=text,
        settings=yaml_values(text, str(folder.run)),
        plan=table(folder.plan),
        ledger=table(folder.ledger),
        environment=table(folder.environment),
        evaluation=(evaluation := table(folder.evaluation)),
        certificate=table(folder.certificate),
        training=passport.get("training") or {},
        samples=_or_empty(lambda: read_json_lines(folder.samples), damaged, []) if evaluation else [],
        records=_read_lines(folder.metrics, damaged, _is_record),
        events=_read_lines(folder.events, damaged, lambda line: isinstance(line.get("message"), str)),
        damaged=tuple(damaged),
    )


def _or_empty(read: Callable[[], Any], damaged: list[str], empty: Any = None) -> Any:
    try:
        return read()
    except UserError as error:
        damaged.append(str(error).splitlines()[0])
        return {} if empty is None else empty


def _read_lines(path: Path, damaged: list[str], is_whole: Callable[[Record], bool]) -> list[Record]:
    """Return the records of a file; the last line may be cut, since it is being written."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    found, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and is_whole(record):
            found.append(record)
        elif line.strip():
            bad.append(number)
    if bad:
        first = f"line {bad[0]} is" if len(bad) == 1 else f"{len(bad)} lines are, the first of them line {bad[0]},"
        damaged.append(f"{path.name}: {first} damaged and left out")
    return found


def _is_record(line: Record) -> bool:
    is_step = isinstance(line.get("step"), int) and isinstance(line.get("kind"), str)
    # What is drawn has to be a number: a record that a person edited is no reason for a page to fail.
    return is_step and (line["kind"] != "train" or isinstance(line.get("loss"), int | float))
