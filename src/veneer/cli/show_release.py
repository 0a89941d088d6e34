"""What merge, export and certify print for a person."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn


@contextmanager
def byte_progress(out: Console, what: str) -> Iterator[Callable[[int], None]]:
    """A line of bytes done and bytes a second; yields the function that moves it."""
    columns = (TextColumn(what), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done: progress.advance(task, done)


def show_merged(out: Console, report: Any) -> None:
    """What a merge wrote."""
    out.print(
        f"[bold]written[/bold]  {escape(report.out)}: {report.tensors} tensors ({report.changed} of them changed), "
        f"{report.bytes / 1e9:.2f} GB in {report.files} file{'s' if report.files != 1 else ''}, {report.dtype}"
    )
    show_warnings(out, report.warnings)


def show_warnings(out: Console, warnings: Any) -> None:
    """Warnings, a line each."""
    for warning in warnings:
        out.print(f"  [yellow]warning:[/yellow] {escape(warning)}")
