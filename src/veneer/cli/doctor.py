"""veneer doctor: the machine as found, what is broken, and what it can train."""

from typing import Annotated

import typer


def doctor(
    measure: Annotated[bool, typer.Option("--measure", help="Measure its speed too; takes about 20 seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> int:
    """Examine this machine: GPU, libraries, what works, what is broken, and which models it can train.

    Exit status 1 where something is broken; the fix is printed beside it.

    Example: `veneer doctor --measure`
    """
    from veneer.cli import show, show_plan

    out = show.console(as_json)
    with show.status(out, "measuring" if measure else "looking"):
        import veneer

        examined = veneer.doctor(measure)
    result = examined.as_dict()
    if as_json:
        show.print_json(result)
    else:
        show_plan.show_machine(out, result)
    return 1 if examined.problems else 0
