"""What the commands print for a person: tables, the live progress of a run, scores with intervals.

All of it goes to standard error when a command prints JSON, so that standard output holds JSON alone.
"""

import json
import os
import shutil
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


def console(as_json: bool = False) -> Console:
    """Where text for a person goes."""
    return Console(stderr=as_json, highlight=False, soft_wrap=True)


def command_name() -> str:
    """How this shell calls the command: `veneer` where it is on the path, else the path it was started by."""
    return "veneer" if shutil.which("veneer") else os.path.relpath(sys.argv[0])


def print_json(value: Any) -> None:
    """The command's result, alone on standard output."""
    print(json.dumps(value, ensure_ascii=False))


class LiveProgress:
    """A listener that draws a run's progress: loss, tokens a second, memory, time left."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=out,
        )

    def on_start(self, steps: int, done: int) -> None:
        self._task = self._progress.add_task("training", total=steps, completed=done, numbers="")
        self._progress.start()

    def on_record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "eval":
            self._out.print(f"  step {record['step']}: held-out loss {record['loss']:.4f}")
            return
        numbers = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tok/s  {size(record['peak_bytes'])}"
        self._progress.update(self._task, completed=record["step"], numbers=numbers)
        if not self._out.is_terminal and _is_milestone(record["step"], self._progress.tasks[0].total):
            self._out.print(f"  step {record['step']}: {numbers}")

    def on_end(self) -> None:
        self._progress.stop()


def _is_milestone(step: int, total: float | None) -> bool:
    """Where nothing can be redrawn (a log file), ten lines tell the story."""
    return step == total or step % max(1, round((total or 1) / 10)) == 0


def show_engine(out: Console, choice: Any, indent: str = "") -> None:
    """Which engine a run has and why; a failed check in yellow."""
    out.print(f"{indent}engine   {choice.engine.name}: {escape(choice.reason)}")
    if choice.warning:
        out.print(f"{indent}[yellow]warning:[/yellow] {escape(choice.warning)}")


def show_checks(out: Console, checks: list[dict[str, Any]]) -> None:
    """Checks with their values and limits, and below them what is to be said of single ones."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "check", "value", "limit", "what is measured"):
        table.add_column(column, justify="right" if column in ("value", "limit") else "left", overflow="fold")
    for check in checks:
        applies = check["value"] is not None or not check["passed"]
        mark = "[dim]-[/dim]" if not applies else "[green]ok[/green]" if check["passed"] else "[red]failed[/red]"
        sign = "≥" if check["bound"] == "at least" else "≤"
        value = ("not finite" if check["value"] is None else f"{check['value']:.3g}") if applies else ""
        limit = "" if check["limit"] is None else f"{sign} {check['limit']:.3g}"
        table.add_row(mark, check["id"], value, limit, escape(check["what"]))
    out.print(table, soft_wrap=False)
    notes: dict[tuple[str, str], list[str]] = {}
    for check in checks:
        if "note" in check:
            kind = "not applicable" if check["passed"] else "failed"
            notes.setdefault((kind, check["note"]), []).append(check["id"])
        elif not check["passed"] and "worst" in check:
            out.print(f"  {check['id']} is worst in {escape(check['worst'])}")
    for (kind, note), names in notes.items():
        out.print(f"  {kind} ({', '.join(names)}): {escape(note)}")


def show_ledger(out: Console, ledger: dict[str, Any]) -> None:
    """The ledger as a table, with its warnings."""
    rows, tokens, lengths = ledger["rows"], ledger["tokens"], ledger["lengths"]["percentiles"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, known in list(ledger["files"].items())[:8]:
        table.add_row("format", escape(f"{name}: {known['format']} ({known['reason']})"))
    if (more := len(ledger["files"]) - 8) > 0:
        table.add_row("", f"and {more} more files")
    fates = ("unreadable", "empty", "duplicate", "overlong", "refused")
    left_out = ", ".join(f"{rows[name]:,} {name}" for name in fates if rows[name])
    table.add_row("rows", f"{rows['read']:,} read = {rows['used']:,} used" + (f" + {left_out}" if left_out else ""))
    table.add_row("split", f"{rows['training']:,} to train on, {rows['validation']:,} held out")
    share = tokens["trained"] / tokens["total"]
    table.add_row(
        "tokens",
        f"{tokens['total']:,}, of which trained {tokens['trained']:,} ({share:.0%}), "
        f"end-of-turn {tokens['end_of_turn']:,}; longest row {tokens['longest_row']:,}",
    )
    table.add_row("lengths", ", ".join(f"{name} {value:,}" for name, value in lengths.items()) + " (before any limit)")
    pack = ledger["packing"]
    would = "packed" if pack["used"] else "would pack"
    table.add_row("packing", f"{would} into {pack['packs']:,} sequences, {pack['efficiency']:.1%} full")
    cached = ", from the cache" if ledger["cached"] else ""
    table.add_row("time", f"{ledger['seconds']:.1f} s{cached}")
    out.print(table)
    for warning in ledger["warnings"]:
        out.print(f"  [yellow]warning:[/yellow] {escape(warning)}")


def show_histogram(out: Console, lengths: dict[str, Any], width: int = 40) -> None:
    """How many rows are how long, as bars."""
    bars = lengths["histogram"]
    most = max(bar["rows"] for bar in bars)
    out.print("[bold]lengths[/bold] in tokens, before any limit")
    for bar in bars:
        drawn = "█" * round(width * bar["rows"] / most) or ("▏" if bar["rows"] else "")
        out.print(f"  {bar['from']:>7,} to {bar['to'] - 1:<7,} {drawn} {bar['rows']:,}")


def show_problems(out: Console, problems: list[dict[str, str]], most: int = 10) -> None:
    """The first rows that are not used, and why."""
    table = Table(title=f"first {min(most, len(problems))} rows left out", title_justify="left")
    for column in ("row", "why", ""):
        table.add_column(column, overflow="fold")
    for problem in problems[:most]:
        table.add_row(escape(problem["place"]), problem["fate"], escape(problem["reason"]))
    out.print(table)


def show_rows(out: Console, rows: list[dict[str, Any]]) -> None:
    """Rows with their tokens: trained green, masked dim, control tokens reversed."""
    trained, masked, control = "[green]trained[/green]", "[dim]only read[/dim]", "[reverse]control token[/reverse]"
    out.print(f"[bold]rows[/bold] as the model sees them: {trained}, {masked}, {control}")
    for row in rows:
        out.print(f"[bold]{escape(row['place'])}[/bold]  {row['tokens']} tokens, {row['trained']} trained")
        text = Text()
        for piece in row["pieces"]:
            style = ("green" if piece["weight"] else "dim") + (" reverse" if piece["control"] else "")
            text.append(piece["text"], style)
        out.print(text, soft_wrap=False)


def show_evaluation(out: Console, evaluation: dict[str, Any]) -> None:
    """Base against tuned, with 95% intervals; the difference's interval pairs the rows."""
    show_scores(out, f"{evaluation['rows']} held-out rows, 95% intervals", evaluation["metrics"], ("base", "tuned"))


def show_scores(out: Console, title: str, metrics: dict[str, Any], models: tuple[str, ...]) -> None:
    """Scores of several models side by side: shares in percent, others as they are.

    Args:
        title: Of the table.
        metrics: By name and model; `difference` beside the models where it is known.
        models: Keys of the models, in the order to show.
    """
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    shown = models + (("difference",) if all("difference" in values for values in metrics.values()) else ())
    for column in ("metric", *shown):
        table.add_column(column.replace("_", " "), justify="left" if column == "metric" else "right")
    for name, values in metrics.items():
        cells = (interval(name, values[which], which == "difference") if which in values else "" for which in shown)
        table.add_row(escape(name.removeprefix("field.").replace("_", " ")), *cells)
    out.print(table, soft_wrap=False)


def interval(metric: str, value: dict[str, float], is_difference: bool = False) -> str:
    """A value with its interval: shares in percent (their differences in points), perplexities as they are."""
    numbers = [value[key] for key in ("value", "low", "high")]
    if metric != "perplexity":
        sign, unit = ("+", "") if is_difference else ("", "%")
        first, low, high = (f"{100 * number:{sign}.0f}" for number in numbers)
        return f"{first}{unit} ({low}{' to ' if is_difference else '-'}{high})"
    first, low, high = (f"{number:{'+' if is_difference else ''}.3g}" for number in numbers)
    return f"{first} ({low} to {high})"


def answer_progress(out: Console, rows: int, what: str) -> tuple[Progress, Any]:
    """A bar for answering rows, and the function that moves it."""
    progress = Progress(
        TextColumn(what),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    )
    task = progress.add_task(what, total=rows)
    return progress, lambda done: progress.advance(task, done)


def size(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 2**30:.2f} GiB"
