"""veneer judge: which of two sets of answers is better, by a judge model or by a person."""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer


def judge(
    run: Annotated[Path, typer.Argument(help="Folder of a run that was evaluated.")],
    endpoint: Annotated[
        str | None,
        typer.Option(help="Address of the judge, an OpenAI-compatible server; its key is read from OPENAI_API_KEY."),
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write an HTML page on which a person votes blindly.")] = None,
    votes: Annotated[Path | None, typer.Option(help="Count the votes that such a page saved.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the judge model, where the server has several.")] = None,
    criterion: Annotated[
        str | None, typer.Option(help="What makes an answer the better one: a text, or a file that holds it.")
    ] = None,
    with_reference: Annotated[
        bool, typer.Option("--with-reference", help="Show the judge the right answer as well.")
    ] = False,
    answers: Annotated[
        str | None, typer.Option(help="Two keys of the samples to compare; the win rate is the second's. [base,tuned]")
    ] = None,
    samples: Annotated[str | None, typer.Option(help="File of answers instead of the run's samples.jsonl.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another run, or its samples, whose tuned answers take the base's place.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="Maximum number of rows.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, max=256, help="Concurrent requests. [8]")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest reply of the judge, in tokens. [1024]")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, help="Seconds that a reply may take. [120]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the page's order and sides; the same for --votes.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> None:
    """Compare two sets of answers to the same rows: how often is the tuned model's the better one?

    The answers are those that `veneer evaluate` wrote. A judge model is asked about each pair in both positions; a
    person votes on a page that does not say which answer is whose.

    Example: `veneer judge runs/tickets --endpoint http://localhost:8000`

    - `veneer judge runs/tickets --page vote.html` writes the page; open it, vote, and save the votes

    - `veneer judge runs/tickets --votes tickets-votes.json` counts them
    """
    from veneer.cli import show
    from veneer.config import UserError

    if sum(given is not None for given in (endpoint, page, votes)) != 1:
        raise UserError(
            "who judges? Exactly one of --endpoint, --page and --votes",
            "--endpoint URL for a judge model; --page FILE.html and then --votes FILE.json for a person",
        )
    unused = {
        "--model": model if endpoint is None else None,
        "--with-reference": with_reference and endpoint is None,
        "--criterion": criterion if votes is not None else None,
        "--at-once": at_once if endpoint is None else None,
        "--max-new-tokens": max_new_tokens if endpoint is None else None,
        "--timeout": timeout if endpoint is None else None,
        "--seed": seed if endpoint is not None else 0,
    }
    for option, value in unused.items():
        if value:
            raise UserError(f"{option}: does nothing here", "leave it out; `veneer judge --help` says what takes it")
    from veneer.api import judge as api
    from veneer.cli.progress import Answering

    out = show.console(as_json)
    which = api.WhichAnswers(samples, answers, against, rows)
    if page is not None:
        _write_page(out, run, page, which, criterion, seed, as_json)
        return
    if votes is not None:
        result = api.count_votes(run, votes, which, seed)
    else:
        assert endpoint is not None
        with show.status(out, "asking the judge") as status:
            told = Answering(status)
            result = api.judge(
                run,
                endpoint,
                model,
                criterion,
                which,
                with_reference=with_reference,
                at_once=at_once or api.AT_ONCE,
                max_new_tokens=max_new_tokens or api.MAX_NEW_TOKENS,
                timeout=timeout or api.TIMEOUT_SECONDS,
                on_begin=told.begin,
                on_done=told.add,
            )
    if as_json:
        show.print_json(result.as_dict())
    else:
        _show(out, result.as_dict())


def _write_page(out: Any, run: Path, page: Path, which: Any, criterion: str | None, seed: int, as_json: bool) -> None:
    """Write the page on which a person votes, and say what to do with it."""
    from veneer.api import judge as api
    from veneer.cli import checks, show

    path = checks.output_file("--page", page, "<!doctype html>")
    pairs = api.write_vote_page(run, path, which, criterion, seed)
    if as_json:
        show.print_json({"page": str(path), "pairs": pairs, "seed": seed})
        return
    out.print(f"page   {path}: {pairs} pairs; open it in a browser, vote, and save the votes", markup=False)
    given = {"answers": which.answers, "samples": which.samples, "against": which.against, "rows": which.rows}
    options = _options(**given, seed=seed or None)
    out.print(f"next   {show.command_name()} judge {quote(str(run))}{options} --votes FILE.json", markup=False)


def _show(out: Any, result: dict[str, Any]) -> None:
    from rich.markup import escape

    from veneer.cli import show

    counts = f"{result['wins']} won, {result['ties']} tied, {result['losses']} lost"
    equal = f" ({result['equal_answers']} with equal answers)" if result["equal_answers"] else ""
    show.say(out, f"detectable difference from 50%: {100 * result['detectable']:.1f} points, in 80 of 100 comparisons")
    show.say(
        out,
        f"win rate  [bold]{_percent(result['win_rate'])}[/bold] of {escape(result['second'])} against "
        f"{escape(result['first'])}, 95% interval; {result['rows']} rows: {counts}{equal}",
    )
    found = result["verdict"]
    verdict = f"equal within {100 * float(found.split()[-1]):.1f} points" if found.startswith("equal") else found
    color = {"better": "green", "worse": "red"}.get(found, "default")
    needed = result["rows_needed"]
    more = f", about {needed:,} rows like these would show which is better" if needed else ""
    show.say(out, f"verdict   [{color}]{verdict}[/{color}], p = {result['probability']:.3f} of better{more}")
    if "judge" in result:
        show.say(out, f"judge     {escape(result['by'])} at {escape(result['judge']['endpoint'])}")
        if result["disagreement"]:
            show.say(out, f"position  contradicts itself when swapped: {_percent(result['disagreement'])}, tied")
        if result["first_shown_wins"]:
            show.say(out, f"          the answer shown first wins {_percent(result['first_shown_wins'])} (50% is fair)")
        if result["unreadable"]:
            show.say(
                out, f"unread    {result['unreadable']} of {result['judgments']} judgments; their rows do not count"
            )
    else:
        show.say(out, f"votes     {result['votes']}, {result['skipped']} skipped; {result['open']} not reached")
        if result["left_wins"]:
            show.say(out, f"position  the left answer wins {_percent(result['left_wins'])} (50% is fair)")
    if result["longer_wins"]:
        show.say(out, f"length    the longer answer wins {_percent(result['longer_wins'])} of what is not tied")
    out.print(f"file      {result['file']}", markup=False)


def _percent(value: dict[str, float]) -> str:
    from veneer.cli import show

    return show.interval("share", value)


def _options(**given: Any) -> str:
    return "".join(f" --{name} {quote(str(value))}" for name, value in given.items() if value is not None)
