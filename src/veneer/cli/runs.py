"""veneer runs: which runs there are, and how each stands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.config.run_state import RunState

STYLES = {"training": "green", "failed": "red", "interrupted": "yellow"}
MORE = ("best", "base", "task")  # columns that a narrow terminal has no room for
FILE_WIDTH = 300  # columns of what is no terminal


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Folders that hold runs; runs/ if none is named.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> None:
    """List the runs in and under folders, the one written last first: state, step, loss, speed and best evaluation.

    States: training (a process holds the run), interrupted (`--resume` goes on with it), failed (an error ended it; it
    can be resumed too), finished, not begun (a process ended before it began). A narrow terminal shows fewer columns.

    Example: `veneer runs runs/`
    """
    from rich.markup import escape

    import veneer
    from veneer.cli import show
    from veneer.cli.progress import NARROW

    found = veneer.runs(*(folders or ()))
    if as_json:
        show.print_json(found.as_dict())
        return
    out = show.console()
    if not out.is_terminal:
        out.width = FILE_WIDTH
    if found.runs:
        out.print(_table(found.runs, out.width < NARROW), soft_wrap=False)
    else:
        out.print(f"no runs in {', '.join(map(str, folders or [Path('runs')]))}", markup=False)
    for run in found.runs:
        if run.message:
            show.say(out, f"failed   {escape(run.run_dir)}: {escape(run.message.splitlines()[0])}")
    for folder, reason in found.skipped:
        show.say(out, f"skipped  {escape(folder)}: {escape(reason)}")


def _table(runs: "tuple[RunState, ...]", is_narrow: bool) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    names = ["run", "state", "step", "loss", "held-out", "tok/s", "written", *([] if is_narrow else MORE)]
    for name in names:
        is_number = name in ("step", "loss", "held-out", "tok/s")
        is_long = name in ("run", *MORE)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=not is_long)
    for run in runs:
        best = "" if run.best_value is None else f"{run.best_metric} {run.best_value:.4g} at {run.best_step}"
        cells = {
            "run": escape(run.run_dir),
            "state": f"[{STYLES[run.state]}]{run.state}[/]" if run.state in STYLES else run.state,
            "step": str(run.step) if run.steps is None else f"{run.step}/{run.steps}",
            "loss": _text(run.loss, ".4f"),
            "held-out": _text(run.held_out_loss, ".4f"),
            "tok/s": _text(run.tokens_per_second, ",.0f"),
            "written": _local(run.last_written),
            "best": escape(best),
            "base": escape(Path(run.base).name if run.base.startswith("/") else run.base),
            "task": escape(run.task),
        }
        table.add_row(*(cells[name] for name in names))
    return table


def _text(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _local(time: str) -> str:
    """Return a time in this machine's own zone."""
    from datetime import datetime

    return datetime.fromisoformat(time).astimezone().strftime("%m-%d %H:%M")
