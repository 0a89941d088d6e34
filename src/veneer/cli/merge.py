"""veneer merge and veneer unmerge: base and adapter as one model on disk, and the inverse."""

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[str, typer.Argument(help="Folder of a finished run, or of an adapter.")]
BaseOption = Annotated[str | None, typer.Option(help="Another base than the one the adapter names.")]
RowsOption = Annotated[
    int | None, typer.Option(min=0, help="Number of held-out rows to answer; by default, as many as the run evaluates.")
]
OnOption = Annotated[
    str,
    typer.Option(
        help="trained: the base that the run trained on; base: the 16-bit base; nf4: the base in 4 bits, "
        "dequantized; best: nf4 or base, measured on held-out rows."
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Continue if the adapter does not belong to the base.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")]


def merge(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The new model's folder.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    on: OnOption = "trained",
    base: BaseOption = None,
    force: ForceOption = False,
    certify: Annotated[bool, typer.Option(help="Compare the merged model with the evaluated one.")] = True,
    rows: RowsOption = None,
    as_json: JsonOption = False,
) -> int:
    """Merge an adapter into its base: W + scale B A in float32, rounded once, tensor by tensor.

    Example: `veneer merge runs/tickets --out models/tickets`
    """
    from veneer.cli import checks

    checks.require_options({"--dtype": dtype, "--on": on})
    checks.require_tuned(run, base)
    out = out.expanduser()
    checks.require_new_folder(out)
    import veneer
    from veneer.cli import show, show_release

    out_console = show.console(as_json)
    with show.byte_progress(out_console, "merging") as on_done:
        report = veneer.merge(run, out, dtype, on, base, force, on_done)
    show_release.show_merged(out_console, report)
    result = report.as_dict()
    status = 0
    if certify and report.difference is None:
        certificate, status = show_release.certified(out_console, str(out), run, base, force, rows)
        result["certificate"] = certificate
    if as_json:
        show.print_json(result)
    return status


def unmerge(
    merged: Annotated[Path, typer.Argument(help="Folder of a merged model.")],
    adapter: Annotated[str, typer.Option(help="The run or adapter that was merged.")],
    out: Annotated[Path, typer.Option(help="Folder of the unmerged model.")],
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take an adapter out of a merged model: what is left is its base, within rounding.

    Example: `veneer unmerge models/tickets --adapter runs/tickets --out models/base`
    """
    from veneer.cli import checks

    checks.require_merged(str(merged), adapter)
    out = out.expanduser()
    checks.require_new_folder(out)
    import veneer
    from veneer.cli import show, show_release

    out_console = show.console(as_json)
    with show.byte_progress(out_console, "unmerging") as on_done:
        report = veneer.unmerge(merged, adapter, out, force, on_done)
    show_release.show_merged(out_console, report)
    if as_json:
        show.print_json(report.as_dict())
