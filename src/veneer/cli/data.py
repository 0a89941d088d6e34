"""veneer data: what becomes of every row and token, before anything is trained."""

from pathlib import Path
from typing import Annotated, Any

import typer


def data(
    name: Annotated[str, typer.Argument(help="A run's YAML file, or data as data.train takes it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings: data.max_length=1024 ...")] = None,
    model: Annotated[str | None, typer.Option(help="Base model; needed where no YAML file names it.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show with their tokens.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Write the report as an HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> None:
    """Show the ledger of a data set, and rows with trained and masked tokens in different colours.

    Example: `veneer data tickets.jsonl --model smollm2-135m-instruct --html tickets.html`
    """
    from veneer.cli import checks, show

    run = _settings(name, overrides or [], model)
    out = show.console(as_json)
    if html is not None:
        html = checks.output_file("--html", html, "<!doctype html>")
    checks.require_inputs(run)
    with show.status(out, "reading"):
        import veneer

        prepared = veneer.prepare(run, rows)
    if html is not None:
        from veneer.config.folder import write_text
        from veneer.report.data_page import data_page

        title = run.data.train if isinstance(run.data.train, str) else ", ".join(run.data.train)
        write_text(html, data_page(title, run.model.base, prepared.as_dict()))
    if as_json:
        show.print_json(prepared.as_dict())
        return
    show.show_ledger(out, prepared.ledger)
    show.show_histogram(out, prepared.ledger["lengths"])
    if problems := prepared.ledger["problems"]:
        show.show_problems(out, problems)
    if prepared.samples:
        show.show_rows(out, prepared.samples)
    if html is not None:
        out.print(f"page  {html}", markup=False)


def _settings(name: str, overrides: list[str], model: str | None) -> Any:
    """Return the run that a YAML file describes, or the smallest one on some data."""
    from veneer.config import UserError, load_run, run_of

    given = [f"model.base={model}"] if model else []
    if name.endswith((".yaml", ".yml")):
        return load_run(Path(name), [*overrides, *given])
    if model is None:
        raise UserError(f"{name}: no base model is named, but its tokenizer is needed", "name it with --model")
    return run_of({"model": {"base": model}, "data": {"train": name}}, overrides)
