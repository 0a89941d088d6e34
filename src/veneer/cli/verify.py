"""veneer verify: whether training does what it should, on this machine with this run's model and rows."""

import shlex
from pathlib import Path
from typing import Annotated

import typer


def verify(
    run: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides: section.key=value.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Load even if the plan says it cannot fit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> int:
    """Check engine, masks, gradients, learning and the adapter's file in small experiments; nothing is written.

    Exit status 1 where a check fails.

    Example: `veneer verify run.yaml`
    """
    from rich.markup import escape

    from veneer.cli import checks, show
    from veneer.config import load_run

    settings = load_run(run, overrides or ())
    checks.require_inputs(settings)
    out = show.console(as_json)
    with show.status(out, "loading") as status:
        import veneer

        found = veneer.verify(settings, force, lambda check: status.update(f"checked {check.id}"))
    result = found.as_dict()
    if as_json:
        show.print_json(result)
        return 0 if found.passed else 1
    show.show_checks(out, result["checks"])
    show.show_engine(out, found.choice)
    failed = [check.id for check in found.checks if not check.passed]
    if failed:
        out.print(f"[red]failed[/red]   {', '.join(failed)}: see docs/verify.md")
    else:
        next_ = escape(f"{show.command_name()} train {shlex.quote(str(run))}")
        out.print(f"[bold]passed[/bold]   in {result['seconds']} s; next  {next_}")
    return 1 if failed else 0
