"""veneer chat: a conversation in the terminal."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

HELP = """/model [NAME]   show the models, or go on with another one
/system [TEXT]  another system prompt; without a text the run's own
/save FILE      append the conversation to a file, as a row of training data
/reset          forget the conversation
/quit           end (Ctrl-D too)"""


def chat(
    models: Annotated[
        list[str], typer.Argument(help="Runs, adapters or a base, which share one base. NAME=PLACE names one.")
    ],
    base: Annotated[str | None, typer.Option(help="Another base than the adapters name.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Let the base answer too, before the tuned model.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt instead of the run's own.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest answer; above: sampled.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 42,
    force: Annotated[
        bool, typer.Option("--force", help="Take adapters even on a base they were not trained on.")
    ] = False,
) -> None:
    """Talk with a tuned model; answers appear as they are made. /help lists what can be done.

    Questions are read a line each from standard input where that is no terminal.

    Example: `veneer chat runs/demo --compare`
    """
    from veneer.cli import checks, show
    from veneer.config import UserError

    for model in models:
        checks.require_served(model, base)
    out = show.console()
    with show.status(out, "loading") as waits:
        import veneer

        with veneer.chat(models, base=base, force=force) as session:
            waits.stop()
            if compare and (session.base is None or session.model == session.base):
                raise UserError(
                    "--compare: there is no tuned model with its base", "name a run that trained an adapter"
                )
            session.system = system
            is_terminal = sys.stdin.isatty()
            if is_terminal:
                out.print(f"{session.model} answers; /help lists commands", markup=False, highlight=False)
            sampling = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
            while (line := _line(f"{session.model}> " if is_terminal else "")) is not None:
                try:
                    if line.startswith("/"):
                        if not _command(out, session, line):
                            break
                    elif line.strip():
                        _ask(out, session, line, compare, sampling)
                except UserError as error:
                    if not is_terminal:
                        raise
                    out.print(str(error), style="red", markup=False, highlight=False)
                except KeyboardInterrupt:
                    if not is_terminal:
                        raise
                    out.print("\nstopped", highlight=False)


def _line(prompt: str) -> str | None:
    """Return the next line; None: there are no more."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None


def _ask(out: Any, session: Any, line: str, compare: bool, sampling: dict[str, Any]) -> None:
    def show(piece: str) -> None:
        out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

    if compare:
        out.print(f"{session.base}: ", end="", style="dim", markup=False, highlight=False)
        session.answer(session.base, [*session.turns, {"role": "user", "content": line}], show, **sampling)
        out.print(f"\n{session.model}: ", end="", style="bold", markup=False, highlight=False)
    session.say(line, show, **sampling)
    out.print()


def _command(out: Any, session: Any, line: str) -> bool:
    """Do what a line that begins with / says; return whether the conversation goes on."""
    from veneer.config import UserError

    word, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if word in ("/quit", "/exit", "/q"):
        return False
    if word == "/model":
        if rest:
            session.use(rest)
        out.print(", ".join(f"[{name}]" if name == session.model else name for name in session.models), markup=False)
    elif word == "/system":
        session.system = rest or None
    elif word == "/reset":
        session.reset()
    elif word == "/save":
        if not rest:
            raise UserError("/save: needs a file", "write /save FILE")
        session.save(Path(rest).expanduser())
        out.print(f"saved to {rest}", markup=False, highlight=False)
    elif word == "/help":
        out.print(HELP, markup=False, highlight=False)
    else:
        raise UserError(f"{word}: no such command", "/help lists them")
    return True
