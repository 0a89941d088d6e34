"""veneer init: a first run file for some data."""

import shlex
from pathlib import Path
from typing import Annotated

import typer


def init(
    data: Annotated[str, typer.Argument(help="File, glob, folder or hub dataset, as data.train takes it.")],
    model: Annotated[str | None, typer.Option(help="Base model; otherwise the small built-in one.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Finished run that a run on pairs of answers starts from.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("run.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> None:
    """Look at data, recognise its format, and write a small commented YAML file that trains on it.

    With --from the data are pairs of answers, and the file prefers them (DPO) on top of that run: with its base,
    quantization, adapter's shape, template and length.

    Example: `veneer init tickets.jsonl --out tickets.yaml`
    """
    from veneer.cli import show
    from veneer.config import Model, UserError
    from veneer.config.folder import write_text
    from veneer.config.names import find_model

    out = out.expanduser()
    if out.exists() and not (overwrite and out.is_file()):
        raise UserError(f"--out {out}: the file exists", "name another file with --out, or replace it with --overwrite")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder does not exist", "name a file in a folder that exists")
    if model is not None and start is not None:
        raise UserError(f"--model {model}: --from {start} names the base already", "leave one of them out")
    if model is not None:
        find_model(Model(base=model))
    from veneer.data.starter import preference_page, starter_page

    page, found = starter_page(data, model, str(out)) if start is None else preference_page(data, start, str(out))
    write_text(out, page)
    if as_json:
        show.print_json({"file": str(out), "formats": found})
        return
    console = show.console()
    for name, recognised in found.items():
        console.print(f"{name}: {recognised}", markup=False)
    console.print(f"wrote  {out}", markup=False)
    console.print(f"next   {show.command_name()} plan {shlex.quote(str(out))}", markup=False)
