"""What the commands print for a person: tables, the live progress of a run, scores with intervals.

All of it goes to standard error when a command prints JSON, so that standard output holds JSON alone.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from veneer.cli.progress import LiveProgress as LiveProgress
from veneer.cli.progress import Status
from veneer.cli.progress import answer_progress as answer_progress
from veneer.cli.progress import byte_progress as byte_progress
from veneer.cli.progress import size as size
from veneer.cli.terminal import Terminal
from veneer.config.results import limit_text, metric_name, value_text


def console(as_json: bool = False) -> Console:
    """Make the console for text that a person reads."""
    is_later_rank = os.environ.get("RANK", "0") != "0"  # whose standard output goes nowhere
    return Terminal(stderr=as_json and not is_later_rank)


def status(out: Console, what: str) -> Status:
    """Show what is being done and for how long, for a `with` block."""
    return Status(out, what)


def command_name() -> str:
    """Return how this shell calls the command: `veneer` where it is on the path, else the path it was started by."""
    if Path(sys.argv[0]).name == "__main__.py":
        return "python -m veneer"
    return "veneer" if shutil.which("veneer") else os.path.relpath(sys.argv[0])


def print_json(value: Any) -> None:
    """Print the command's result, alone on standard output, in ASCII, which any encoding and terminal takes."""
    print(json.dumps(value))


def say(out: Console, markup: str, hang: int = 9) -> None:
    """Print a line of text: on a terminal wrapped between words and indented below, in a file never cut or wrapped."""
    text = Text.from_markup(markup)
    if not out.is_terminal:
        out.print(text)
        return
    first, *more = text.wrap(out, max(20, out.width - hang))
    out.print(first)
    for line in more:
        out.print(Text(" " * hang) + line)


def show_engine(out: Console, choice: Any, indent: str = "") -> None:
    """Print which engine a run has and why."""
    say(out, f"{indent}engine   {choice.engine.name}: {escape(choice.reason)}", 9 + len(indent))


def show_checks(
    out: Console, checks: list[dict[str, Any]], skipped: dict[str, str] | None = None, title: str = ""
) -> None:
    """Print checks beside their limits, and the details of single ones below the table.

    Args:
        out: The console to print on.
        checks: The checks, as `Check.as_dict` gives them.
        skipped: Checks that could not be made, by name, and why.
        title: The table's title.
    """
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("", "check", "value", "limit", "what is measured"):
        table.add_column(column, justify="right" if column in ("value", "limit") else "left", overflow="fold")
    details: dict[str, list[str]] = {}
    for check in checks:
        applies = check["value"] is not None or not check["passed"]
        mark = "[dim]-[/dim]" if not applies else "[green]ok[/green]" if check["passed"] else "[red]failed[/red]"
        limit = limit_text(check) if applies else ""
        table.add_row(mark, check["id"], *(escape(text) for text in (value_text(check), limit, check["name"])))
        if check["detail"]:
            details.setdefault(check["detail"], []).append(check["id"])
    for name, reason in (skipped or {}).items():
        table.add_row("[dim]-[/dim]", "", "", "", escape(f"{name}: not checked, {reason}"))
    out.print(table, soft_wrap=False)
    for detail, names in details.items():
        say(out, f"  {', '.join(names)}: {escape(detail)}", 4)


def show_ledger(out: Console, ledger: dict[str, Any]) -> None:
    """Print the ledger as a table, with its warnings."""
    rows, tokens, lengths = ledger["rows"], ledger["tokens"], ledger["lengths"]["percentiles"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, known in list(ledger["files"].items())[:8]:
        table.add_row("format", escape(f"{name}: {known['format']} ({known['reason']})"))
    if (more := len(ledger["files"]) - 8) > 0:
        table.add_row("", f"and {more} more files")
    fates = ("unreadable", "empty", "duplicate", "overlong", "refused")
    left_out = ", ".join(f"{rows[name]:,} {name}" for name in fates if rows[name])
    table.add_row("rows", f"{rows['read']:,} read = {rows['used']:,} used" + (f" + {left_out}" if left_out else ""))
    are_pairs = ledger["format"] == "preference"
    what = " pairs of answers" if are_pairs else ""
    table.add_row("split", f"{rows['training']:,}{what} to train on, {rows['validation']:,} held out")
    share = tokens["trained"] / tokens["total"]
    from veneer.data.formats import OF_TASKS  # it imports what not every command needs

    has_turns = ledger["format"] not in OF_TASKS
    ends = f", end-of-turn {tokens['end_of_turn']:,}" if has_turns else ""
    table.add_row(
        "tokens",
        f"{tokens['total']:,}, of which trained {tokens['trained']:,} ({share:.0%}){ends}; "
        f"longest row {tokens['longest_row']:,}",
    )
    table.add_row("lengths", ", ".join(f"{name} {value:,}" for name, value in lengths.items()) + " (before any limit)")
    pack = ledger["packing"]
    would = "packed" if pack["used"] else "would pack"
    if pack["used"] or (has_turns and not are_pairs):
        table.add_row("packing", f"{would} into {pack['packs']:,} sequences, {pack['efficiency']:.1%} full")
    cached = ", from the cache" if ledger["cached"] else ""
    table.add_row("time", f"{ledger['seconds']:.1f} s{cached}")
    out.print(table)
    for warning in ledger["warnings"]:
        say(out, f"  [yellow]warning:[/yellow] {escape(warning)}", 4)


def show_histogram(out: Console, lengths: dict[str, Any], width: int = 40) -> None:
    """Print the lengths of rows as a histogram."""
    bars = lengths["histogram"]
    most = max(bar["rows"] for bar in bars)
    out.print("[bold]lengths[/bold] in tokens, before any limit")
    for bar in bars:
        drawn = "█" * round(width * bar["rows"] / most) or ("▏" if bar["rows"] else "")
        out.print(f"  {bar['from']:>7,} to {bar['to'] - 1:<7,} {drawn} {bar['rows']:,}")


def show_problems(out: Console, problems: list[dict[str, str]], most: int = 10) -> None:
    """Print the first rows that are not used, and why."""
    table = Table(title=f"first {min(most, len(problems))} rows left out", title_justify="left")
    for column in ("row", "why", ""):
        table.add_column(column, overflow="fold")
    for problem in problems[:most]:
        table.add_row(escape(problem["place"]), problem["fate"], escape(problem["reason"]))
    out.print(table)


def show_rows(out: Console, rows: list[dict[str, Any]]) -> None:
    """Print rows with their tokens: trained green, masked dim, control tokens reversed."""
    trained, masked, control = "[green]trained[/green]", "[dim]only read[/dim]", "[reverse]control token[/reverse]"
    out.print(f"[bold]rows[/bold] as the model sees them: {trained}, {masked}, {control}")
    for row in rows:
        out.print(f"[bold]{escape(row['place'])}[/bold]  {row['tokens']} tokens, {row['trained']} trained")
        text = Text()
        for piece in row["pieces"]:
            style = ("green" if piece["weight"] else "dim") + (" reverse" if piece["control"] else "")
            text.append(piece["text"], style)
        out.print(text, soft_wrap=False)


def show_scores(
    out: Console, title: str, metrics: dict[str, Any], models: tuple[str, ...], called: Mapping[str, str] | None = None
) -> None:
    """Print scores of several models side by side: shares in percent, others as they are.

    Args:
        title: The table's title.
        metrics: Results by name and model; `difference` beside the models where it is known.
        models: Keys of the models, in the order to show.
        called: Names of models in the heading, where they are not their keys.
    """
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    shown = models + (("difference",) if all("difference" in values for values in metrics.values()) else ())
    for column in ("metric", *shown):
        heading = (called or {}).get(column, column).replace("_", " ")
        table.add_column(heading, justify="left" if column == "metric" else "right")
    for name, values in metrics.items():
        unit = values.get("unit", "")
        cells = (interval(unit, values[which], which == "difference") if which in values else "" for which in shown)
        table.add_row(escape(metric_name(name)), *cells)
    out.print(table, soft_wrap=False)


def interval(unit: str, value: dict[str, float], is_difference: bool = False) -> str:
    """Format a value with its interval: shares in percent (their differences in points), others as they are."""
    numbers = [value[key] for key in ("value", "low", "high")]
    if unit == "share":
        sign, unit = ("+", "") if is_difference else ("", "%")
        first, low, high = (f"{100 * number:{sign}.0f}" for number in numbers)
        return f"{first}{unit} ({low}{' to ' if is_difference else '-'}{high})"
    first, low, high = (f"{number:{'+' if is_difference else ''}.3g}" for number in numbers)
    return f"{first} ({low} to {high})"
