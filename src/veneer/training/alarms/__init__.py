"""Alarms: faults of a training that its loss does not show, told once while it runs, with the setting to change.

Each alarm is a class of its own that watches what is made: the batches that the engine gets, the weights that the
optimizer moves, the records that are logged. None of them changes a number, and none waits for the device in a step
that is not its own. What each can see and cannot is in its docstring, and in docs/runs.md.
"""

from collections.abc import Callable, Sequence
from typing import Any

from veneer.config.notify import notify
from veneer.data.batch import Batch
from veneer.machine.batching import is_out_of_memory
from veneer.training.alarms.alarm import Alarm, JobFacts, WatchedStep
from veneer.training.alarms.machine import HalfSpeed, MemoryCreeping
from veneer.training.alarms.numbers import (
    DocumentsLeak,
    LayerWithoutGradient,
    LossNotOwn,
    NumbersMissing,
    RateNotScheduled,
)
from veneer.training.alarms.rows import HeldOutTrained, MaskingOff, RowsRepeated

ALARMS: tuple[Callable[[JobFacts], Alarm], ...] = (
    MaskingOff,
    DocumentsLeak,
    RateNotScheduled,
    LossNotOwn,
    NumbersMissing,
    LayerWithoutGradient,
    RowsRepeated,
    HeldOutTrained,
    HalfSpeed,
    MemoryCreeping,
)


class Alarms:
    """The alarms of a run.

    Args:
        facts: Facts of the job; None: there are none.
    """

    def __init__(self, facts: JobFacts | None = None) -> None:
        self._facts = facts
        self._waiting: list[Alarm] = [] if facts is None else [make(facts) for make in ALARMS]
        self._made = 0
        self._step: WatchedStep | None = None

    def before(self, number: int, batches: Sequence[Batch]) -> None:
        """Show a step, counted from 1, before its passes."""
        if self._facts is None:
            return
        self._made += 1
        self._step = WatchedStep(number, self._made, batches, self._facts.engine, self._facts.documents_per_row)
        for alarm in self._waiting:
            try:
                alarm.before(self._step)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise  # where its passes do not fit beside the run's, it has seen nothing

    def after(self, record: dict[str, Any]) -> None:
        """Show the record of the step that was shown before."""
        if self._step is None:
            return
        step, self._step = self._step, None
        step.record = record
        for alarm in list(self._waiting):
            if message := alarm.after(step):
                notify(message, where=alarm.where)
                self._waiting.remove(alarm)
