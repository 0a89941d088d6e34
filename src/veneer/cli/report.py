"""veneer report: the page of a run, or several runs on one."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are set side by side.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. [default: report.html, in the run's folder or, of several, here]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> None:
    """Write the page of a run anew, or one page that sets several runs side by side.

    Training writes report.html itself, and commands that measure a run write it anew. It is one file that fetches
    nothing: open it in a browser, send it, print it.

    Example: `veneer report runs/tickets`

    Example: `veneer report runs/rank-8 runs/rank-16 --out ranks.html`
    """
    from veneer.api.report import write_report
    from veneer.cli import show
    from veneer.config.notify import notify

    made = write_report(*runs, out=out)
    for sentence in made.damaged:
        notify(sentence, where=str(made.file))
    if as_json:
        show.print_json(made.as_dict())
    else:
        show.console().print(f"written {made.file}", markup=False, soft_wrap=True)
