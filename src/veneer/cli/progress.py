"""Progress of long tasks is a line that redraws itself on a terminal, and an occasional line in a log file.

A log file gets no control codes and no bars. Lines of progress that are not results go to standard error there, so that
what a command prints can be piped on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from veneer.cli.terminal import Terminal

LOG_SECONDS = 60  # between lines of progress where nothing can be redrawn
# Of an evaluation's record: what is shown otherwise, or not; the rest are metrics of `evaluate.during`.
EVALUATED = {"kind", "step", "loss", "perplexity", "trained_tokens", "answered_rows", "best_step", "best_value"} | {
    "intervals"
}
# Of pairs, what is shown with its interval; all others have a / in their names.
PAIRS = {"rewards/margins": "margin", "rewards/accuracies": "right"}
NARROW = 100  # columns; below them words give way to numbers


def clock(seconds: float) -> str:
    """Format seconds as 1:02 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Format bytes for a person."""
    return f"{count / 2**30:.2f} GiB"


class Status:
    """A line that says what is being done, and for how long; for a `with` block."""

    def __init__(self, out: Console, what: str) -> None:
        self._console = _for_progress(out)
        self._what = what
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> "Status":
        self._task = self._progress.add_task(escape(self._what))
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the line."""
        if self._console.is_terminal:
            self._progress.stop()

    def update(self, what: str) -> None:
        """Show what is being done now."""
        self._progress.update(self._task, description=escape(what))
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= LOG_SECONDS:
            self._printed = now
            self._console.print(f"  {what}, {clock(now - self._started)}", markup=False)


class Answering:
    """Tells on a status line how many rows are answered, and how long the others will take.

    Args:
        status: The line.
    """

    def __init__(self, status: Status) -> None:
        self._status, self._total, self._answered, self._what = status, 0, 0, ""
        self._started = time.monotonic()

    def begin(self, total: int) -> None:
        """Take the number of answers to come, when the first is about to be given."""
        self._total, self._answered, self._what, self._started = total, 0, "", time.monotonic()

    def begin_task(self, task: str, total: int) -> None:
        """Take what is asked now, and the number of its answers to come."""
        self.begin(total)
        self._what = f"{task}: "

    def add(self, count: int) -> None:
        """Take the number of rows just answered; the longest come last, so that what is left takes longer."""
        self._answered += count
        left = (time.monotonic() - self._started) / self._answered * (self._total - self._answered)
        self._status.update(f"{self._what}{self._answered} of {self._total} answers, about {clock(left)} left")


class LiveProgress:
    """A listener that draws a run's progress: loss, tokens a second, memory, time left; for a `with` block.

    Args:
        out: The console to draw on.
        steps: Steps of the whole run.
        done: Steps that were done before.
        step_seconds: Predicted seconds of a step, shown until the first one is done; None: not predicted.
    """

    def __init__(self, out: Console, steps: int, done: int = 0, step_seconds: float | None = None) -> None:
        self._out, self._steps, self._began = out, steps, done
        self._predicted = None if step_seconds is None else step_seconds * (steps - done)
        is_narrow = out.width < NARROW
        self._progress = Progress(
            *([] if is_narrow else [TextColumn("training")]),
            BarColumn(bar_width=8 if is_narrow else 24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            _Left(),
            console=out,
        )

    def __enter__(self) -> "LiveProgress":
        numbers, predicted = "first step", self._predicted
        self._task = self._progress.add_task(
            "training", total=self._steps, completed=self._began, numbers=numbers, ends=None, predicted=predicted
        )
        self._started = self._printed = time.monotonic()
        if self._out.is_terminal:
            self._progress.start()
        else:
            about = "" if self._predicted is None else f", about {clock(self._predicted)} as predicted"
            self._out.print(f"  {self._steps - self._began:,} steps to train{about}")
        return self

    def show_past(self, records: Sequence[dict[str, Any]]) -> None:
        """Show records of before, in their order; the time left is measured from the step of the last one on."""
        for record in records:
            self._show(record, None)
        self.go_on_from(max((record["step"] for record in records), default=self._began))

    def go_on_from(self, step: int) -> None:
        """Measure the time left from this step on, and from now."""
        self._began, self._started = step, time.monotonic()
        self._progress.update(self._task, completed=step, ends=None, predicted=None)

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "divergence" and record["action"] == "rollback":
            self.go_on_from(record["step"])
            return
        made = record["step"] - self._began
        left = None
        if made > 0:
            left = max(0.0, (time.monotonic() - self._started) / made * (self._steps - record["step"]))
        self._show(record, left)

    def _show(self, record: dict[str, Any], left: float | None) -> None:
        """Show a record; `left`: seconds left after it, where they are known."""
        if record["kind"] == "divergence":
            return  # it is told as it happens
        if record["kind"] == "eval":
            loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
            found = _of_pairs(record)
            found += [
                f"{name} {value:.4g}"
                for name, value in record.items()
                if name not in EVALUATED and isinstance(value, float | int) and "/" not in name
            ]
            self._out.print(f"  step {record['step']}: {'  '.join([f'held-out loss {loss}', *found])}", markup=False)
            return
        step = record["step"]
        pairs = ""
        if "rewards/margins" in record:
            right = f"right {record['rewards/accuracies']:.0%}  " if "rewards/accuracies" in record else ""
            pairs = f"margin {record['rewards/margins']:.3g}  {right}"
        speed = f"{record['tokens_per_second']:,.0f} tok/s  {size(record['peak_bytes'])}"
        numbers = f"loss {record['loss']:.4f}  {pairs}{speed}"
        now = time.monotonic()
        ends = None if left is None else now + left
        self._progress.update(self._task, completed=step, numbers=numbers, ends=ends)
        if self._out.is_terminal:
            return
        if _is_milestone(step, self._steps) or now - self._printed >= LOG_SECONDS:
            self._printed = now
            about = f"  {clock(left)} left" if left is not None and step < self._steps else ""
            self._out.print(f"  step {step}: {numbers}{about}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._out.is_terminal:
            self._progress.stop()


class _Left(ProgressColumn):
    """The time left, measured, or as predicted until the first step is done."""

    def render(self, task: Task) -> Text:
        ends, predicted = task.fields["ends"], task.fields["predicted"]
        if ends is not None:
            return Text(f"{clock(max(0.0, ends - time.monotonic()))} left")
        return Text("" if predicted is None else f"of about {clock(predicted)} predicted")


@contextmanager
def answer_progress(out: Console, rows: int, what: str) -> Iterator[Callable[[int], None]]:
    """Draw a bar for answering rows; yields the function that moves it."""
    console = _for_progress(out)
    columns = (TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=rows)
        yield lambda done: progress.advance(task, done)


@contextmanager
def byte_progress(out: Console, what: str) -> Iterator[Callable[[int], None]]:
    """Draw bytes done, bytes a second and the time taken; yields the function that counts them on."""
    console = _for_progress(out)
    columns = (TextColumn(what), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done: progress.advance(task, done)


def _for_progress(out: Console) -> Console:
    """Choose where progress is drawn: beside the results on a terminal, else on standard error."""
    return out if out.is_terminal else Terminal(stderr=True)


def _of_pairs(record: dict[str, Any]) -> list[str]:
    """Return margin and accuracy on held-out pairs with their intervals; empty: the rows are no pairs."""
    found = []
    for name, called in PAIRS.items():
        if (value := record.get(name)) is not None:
            ends = record.get("intervals", {}).get(name)
            kind = ".0%" if called == "right" else ".3g"
            span = "" if ends is None else f" ({ends[0]:{kind}} to {ends[1]:{kind}})"
            found.append(f"{called} {value:{kind}}{span}")
    return found


def _is_milestone(step: int, total: int) -> bool:
    """Return whether a log file gets a line for this step: it gets ten in a run."""
    return step == total or step % max(1, round(total / 10)) == 0
