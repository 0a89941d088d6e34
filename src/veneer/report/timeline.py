"""What happened in a run, in its order: evaluations, checkpoints, messages, divergence, the error that ended it.

metrics.jsonl has steps and times; events.jsonl has times alone. A message belongs to the last step that was recorded
before it.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from veneer.report.run_files import RunFiles
from veneer.report.series import is_number

# In the order in which a chart has them, from above.
KINDS = ("error", "divergence", "memory", "warning", "evaluation", "checkpoint", "message")
_MEMORY = re.compile(r"out of memory|memory ran out|does not fit|tighter placement", re.IGNORECASE)


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        step: optimizer steps done by then.
        kind: one of KINDS.
        message: sentence on it.
        time: UTC, ISO 8601; empty: not known.
    """

    step: int
    kind: str
    message: str
    time: str = ""

    @property
    def clock(self) -> str:
        """The time, as a page shows it."""
        return self.time[:19].replace("T", " ")


def events_of(run: RunFiles) -> list[Event]:
    """Return what happened, in order."""
    timed = [(str(one["time"]), one["step"]) for one in run.records if isinstance(one.get("time"), str)]
    found = [_of_message(event, timed) for event in run.events]
    best = run.state.best_step
    for one in run.held_out:
        loss = f"{one['loss']:.4g}" if is_number(one.get("loss")) else "not finite"
        mark = ", the best so far" if one["step"] == best else ""
        found.append(Event(one["step"], "evaluation", f"held-out loss {loss}{mark}", _time(one)))
    for one in run.records:
        if one["kind"] not in ("train", "eval"):
            told = f"{one.get('reason', one['kind'])}: {one.get('action', '')}".strip(": ")
            found.append(Event(one["step"], "divergence", told, _time(one)))
    found += _checkpoints(run)
    return sorted(found, key=lambda event: (event.step, event.time))


def _of_message(event: dict[str, Any], timed: Sequence[tuple[str, int]]) -> Event:
    time, level, message = _time(event), event.get("level"), event["message"]
    step = event.get("step")
    if not isinstance(step, int):
        before = bisect_right(timed, (time, 10**12)) if time else 0
        step = timed[before - 1][1] if before else 0
    kind = "warning" if level == "warning" else "error" if level == "error" else "message"
    if kind != "error" and _MEMORY.search(message) and step:
        kind = "memory"
    return Event(step, kind, message, time)


def _time(record: dict[str, Any]) -> str:
    time = record.get("time")
    return time if isinstance(time, str) else ""


def _checkpoints(run: RunFiles) -> list[Event]:
    """Return the checkpoints that are there."""
    found = []
    folder = run.path / "checkpoints"
    for path in folder.glob("step-*") if folder.is_dir() else ():
        number = path.name.removeprefix("step-")
        if number.isdecimal():
            time = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
            found.append(Event(int(number), "checkpoint", f"checkpoints/{path.name}", time))
    return found
