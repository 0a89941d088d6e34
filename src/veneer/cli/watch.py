"""veneer watch: follow a run from another terminal."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.config.run_state import RunState


def watch(
    run: Annotated[Path, typer.Argument(help="The run's folder; it need not be there yet.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a run that is stopped to be resumed.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print how the run ended as JSON alone on stdout, as `veneer runs --json`.")
    ] = False,
) -> None:
    """Follow a run from another terminal: the lines that train prints, until the run ends.

    Exit status 0: the run is finished; 1: it was stopped or has failed. Ctrl-C ends the watching and not the run.

    Example: `veneer watch runs/tickets`
    """
    from dataclasses import asdict

    from veneer.cli import show
    from veneer.config.run_state import run_state

    out = show.console(as_json)
    try:
        _follow(out, run, wait)
    except KeyboardInterrupt:
        out.print("no longer watched; the run itself is as it was")
        raise
    if getattr(sys.stdout, "error", None) is not None:
        return
    ended = run_state(run.expanduser())
    if as_json:
        show.print_json(asdict(ended))
    else:
        _show_end(out, ended)
    if ended.state != "finished":
        raise typer.Exit(1)


def _follow(out: Any, run: Path, wait: bool) -> None:
    """Show a run until no process trains it, or nobody reads what is printed."""
    import veneer
    from veneer.cli import show
    from veneer.config import RunFolder
    from veneer.config.run_state import run_state

    told: set[str] = set()
    step, was_stopped = 0, False
    progress: show.LiveProgress | None = None
    with ExitStack() as stack:
        waiting = stack.enter_context(show.status(out, f"waiting for {run} to begin"))
        if not (out.is_terminal or RunFolder(run.expanduser()).run.exists()):
            out.print(f"waiting for {run} to begin", markup=False)
        for look in veneer.watch(run, wait):
            if progress is None and look.has_begun:
                waiting.stop()
                steps = run_state(run.expanduser()).steps or 0
                seconds = None if look.records else _planned_step_seconds(RunFolder(run.expanduser()))
                progress = stack.enter_context(show.LiveProgress(out, steps, 0, seconds))
                progress.show_past(look.records)
            elif progress is not None:
                if look.goes_on_from is not None:
                    step = look.goes_on_from
                    out.print(f"  the run goes on from step {step}")
                if look.goes_on_from is not None or (was_stopped and not look.is_stopped):
                    progress.go_on_from(step)
                for record in look.records:
                    progress(record)
            step = max([step, *(record["step"] for record in look.records)])
            for event in look.events:
                _show_event(out, event, told)
            if look.is_stopped and wait and not was_stopped:
                out.print("  stopped; waiting for it to be resumed")
            was_stopped = look.is_stopped
            if getattr(sys.stdout, "error", None) is not None:  # its reader went away (cli/lasting.py)
                return


def _planned_step_seconds(folder: Any) -> float | None:
    """Return the planned seconds of a step; None: they are not known."""
    from veneer.config import UserError
    from veneer.config.files import read_json

    try:
        seconds = read_json(folder.plan).get("step_seconds")
    except UserError:
        return None
    likely = seconds.get("likely") if isinstance(seconds, dict) else None
    return likely if isinstance(likely, int | float) else None


def _show_event(out: Any, event: dict[str, Any], told: set[str]) -> None:
    """Print what the run told, each message once; the error that ends it comes with its end."""
    level, message = event.get("level"), event.get("message")
    if level in ("info", "warning") and isinstance(message, str) and message not in told:
        told.add(message)
        out.print(f"warning: {message}" if level == "warning" else message, markup=False)


def _show_end(out: Any, run: "RunState") -> None:
    from veneer.cli import show

    at = f"step {run.step}" + ("" if run.steps is None else f" of {run.steps}")
    if run.state == "finished":
        loss = "not known" if run.loss is None else f"{run.loss:.4f}"
        out.print(f"[bold]done    [/bold] {run.step} steps, final loss {loss}")
        if run.best_value is not None:
            out.print(f"best     {run.best_metric} {run.best_value:.4g} after step {run.best_step}", markup=False)
    elif run.state == "failed":
        out.print(f"failed   at {at}: {run.message}", markup=False)
    elif run.state == "training":
        out.print(f"training again, at {at}; `{show.command_name()} watch` follows it", markup=False)
    else:
        resume = "the beginning" if run.resumes_from is None else f"the checkpoint of step {run.resumes_from}"
        out.print(f"stopped  at {at}; `train --resume` goes on from {resume}", markup=False)
