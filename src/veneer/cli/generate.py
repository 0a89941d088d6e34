"""veneer generate: answers to prompts."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    name: Annotated[str, typer.Argument(help="Folder of a run, a checkpoint or an adapter; or a base model.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="One prompt per line, or JSONL with `prompt` or `messages`.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt instead of the run's own.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base's answer beside the tuned one.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest answer; above: sampled.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many of the likeliest tokens; 0: from all.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that occurred before become less likely.")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 42,
    base: Annotated[str | None, typer.Option(help="Another base than the one the adapter names.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Use the adapter even on a base it was not trained on.")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Share the prompts among so many GPUs (or CPU processes)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON alone on stdout.")] = False,
) -> None:
    """Answer prompts with a tuned model; without prompts, one a line is read from standard input.

    On a terminal a single answer appears as it is made.

    Example: `veneer generate runs/demo --compare --prompt "My parcel never came, order 4471"`
    """
    from veneer.cli import checks, ranks, show
    from veneer.config import UserError
    from veneer.config.prompts import require_text
    from veneer.config.sampling import Sampling

    Sampling(temperature, top_p, top_k, repetition_penalty, tuple(stop or ()), seed)
    checks.require_answering(name, base)
    if gpus is not None and gpus > 1 and not prompt and prompts_file is None:
        raise UserError(f"--gpus {gpus}: several processes cannot read standard input", "name a --prompts-file")
    prompts = _prompts(prompt or [], prompts_file)
    require_text([*prompts, system, *(stop or ())])
    ranks.run_on(gpus)
    out = show.console(as_json)
    shown = Shown(out) if len(prompts) == 1 and out.is_terminal and not (as_json or compare) else None
    with show.status(out, "answering") as status:
        if shown is not None:
            shown.before = status.stop
        import veneer

        answers = veneer.generate(
            name, prompts, system, compare, max_new_tokens, temperature, seed, force,
            top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, stop=stop or (), base=base, on_text=shown,
        )  # fmt: skip
        ranks.leave()
    if as_json:
        show.print_json({"answers": answers})
    elif compare:
        _show_both(out, answers)
    elif shown is not None:
        out.print()  # the answer stands there already
    else:
        for answer in answers:
            out.print(answer["answer"], markup=False)


class Shown:
    """Prints pieces of an answer as they come."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self.before: Any = None

    def __call__(self, text: str) -> None:
        if self.before is not None:
            self.before()
            self.before = None
        self._out.print(text, end="", markup=False)


def _prompts(given: list[str], file: Path | None) -> list[Any]:
    """Return the prompts of the options and of the file, or else the lines of standard input."""
    from veneer.config import UserError
    from veneer.config.prompts import plain_prompts, read_prompts

    prompts = [*given, *(read_prompts(file) if file is not None else ())]
    if prompts:
        return prompts
    if sys.stdin.isatty():
        print("one prompt per line; Ctrl-D ends", file=sys.stderr)
    try:
        prompts = plain_prompts(sys.stdin)
    except UnicodeDecodeError:
        raise UserError("standard input: not UTF-8 text", "write the prompts in UTF-8") from None
    if not prompts:
        raise UserError("no prompt", 'give one with --prompt "..." or a line on standard input')
    return prompts


def _show_both(out: Any, answers: list[dict[str, Any]]) -> None:
    """Print answers of base and tuned model side by side."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_lines=True)
    for column in ("prompt", "base", "tuned"):
        table.add_column(column, overflow="fold")
    for answer in answers:
        asked = answer["prompt"] if isinstance(answer["prompt"], str) else answer["prompt"][-1]["content"]
        table.add_row(*(escape(text) for text in (asked, answer["base"], answer["answer"])))
    out.print(table, soft_wrap=False)
