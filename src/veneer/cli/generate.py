"""veneer generate: answers to prompts."""

import sys
from typing import Annotated

import typer


def generate(
    name: Annotated[str, typer.Argument(help="Folder of a run, or a base model.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt instead of the run's own.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base's answer beside the tuned one.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest answer; above: sampled.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 42,
    force: Annotated[
        bool, typer.Option("--force", help="Use the adapter even on a base it was not trained on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON alone on stdout.")] = False,
) -> None:
    """Answer prompts with a tuned model; without --prompt, one prompt a line is read from standard input.

    Example: `veneer generate runs/demo --compare --prompt "My parcel never came, order 4471"`
    """
    from veneer.cli import show
    from veneer.config import UserError

    prompts = prompt or [line.strip() for line in sys.stdin if line.strip()]
    if not prompts:
        raise UserError("no prompt", 'give one with --prompt "..." or a line on standard input')
    from rich.markup import escape
    from rich.table import Table

    from veneer import api

    out = show.console(as_json)
    with out.status("answering"):
        answers = api.generate(name, prompts, system, compare, max_new_tokens, temperature, seed, force)
    if as_json:
        show.print_json({"answers": answers})
        return
    if not compare:
        for answer in answers:
            out.print(answer["answer"], markup=False)
        return
    table = Table(show_lines=True)
    for column in ("prompt", "base", "tuned"):
        table.add_column(column, overflow="fold")
    for answer in answers:
        table.add_row(*(escape(answer[key]) for key in ("prompt", "base", "answer")))
    out.print(table)
