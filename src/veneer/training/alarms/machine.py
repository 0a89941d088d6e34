"""Alarms about the machine: a speed far below the plan's, or below the run's own; memory that grows step by step."""

from collections import deque
from statistics import median

from veneer.training.alarms.alarm import Alarm, JobFacts, WatchedStep

WARM_UP, MEASURED = 5, 10  # steps that are left out, since kernels are compiled then, and that are measured
WINDOW, RISES = 4, 4  # steps of a window, and windows in a row that rise
LEAST_SHARE = 0.02
LEAST_BYTES = {"cuda": 64 * 2**20, "cpu": 256 * 2**20}


class HalfSpeed(Alarm):
    """Tells that a run makes less than half of the tokens a second that were planned, or that it made at first.

    On GPUs alone: elsewhere other processes decide the speed, and there is no plan of it. It cannot see a plan that is
    itself too slow.
    """

    where = "plan.json"

    def __init__(self, facts: JobFacts) -> None:
        self._is_on, self._planned = facts.device == "cuda", facts.planned_speed
        self._speeds: deque[float] = deque(maxlen=MEASURED)
        self._own: float | None = None

    def after(self, step: WatchedStep) -> str | None:
        if not self._is_on or step.in_process <= WARM_UP:
            return None
        self._speeds.append(step.record["tokens_per_second"])
        if len(self._speeds) < MEASURED:
            return None
        speed, first = median(self._speeds), self._own
        self._own = first or speed
        for limit, whose in ((self._planned if first is None else None, "planned"), (first, "reached at first")):
            if limit is not None and speed < limit / 2:
                return (
                    f"step {step.number}: {speed:,.0f} tokens a second, less than half of the {limit:,.0f} that were "
                    f"{whose}\n  fix: look for another process on the GPU and for its temperature (nvidia-smi), and at "
                    "train.engine in plan.json"
                )
        return None


class MemoryCreeping(Alarm):
    """Tells that the memory which the process holds between steps grows and grows.

    It reads the allocated memory of the GPU, or the resident memory on a CPU, and compares the least of each four
    steps. It tells once they have risen at least four times in a row, by 2% and 64 MiB (CPU: 256 MiB). Memory that is
    freed and not returned counts on a CPU. It cannot see a leak of host memory beside a GPU.
    """

    where = "train.output_dir"

    def __init__(self, facts: JobFacts) -> None:
        self._memory, self._least = facts.memory, LEAST_BYTES.get(facts.device, LEAST_BYTES["cpu"])
        self._window: list[int] = []
        self._rising: list[int] = []

    def after(self, step: WatchedStep) -> str | None:
        self._window.append(self._memory())
        if len(self._window) < WINDOW:
            return None
        lowest, self._window = min(self._window), []
        if self._rising and lowest <= self._rising[-1]:
            self._rising = []
        self._rising.append(lowest)
        first, growth = self._rising[0], lowest - self._rising[0]
        if len(self._rising) <= RISES or growth < max(self._least, LEAST_SHARE * first):
            return None
        steps = (len(self._rising) - 1) * WINDOW
        return (
            f"memory grows step by step: by {growth / 2**20:,.0f} MiB in the last {steps} steps, to "
            f"{lowest / 2**30:.2f} GiB at step {step.number}\n  fix: look at what listeners keep; the run can be "
            "stopped and resumed at any step"
        )
