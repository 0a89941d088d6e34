"""What `evaluate` prints of base against tuned: what the rows can show, the verdicts, rows that turned, the gate."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from veneer.cli import show
from veneer.config.results import metric_name

SHOWN = 3  # rows of each kind
WIDTH = 300  # characters of a shown text
COLORS = {"better": "green", "worse": "red"}


def show_detectable(out: Console, comparison: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Print the smallest differences that the rows can show, before any result."""
    if comparison:
        sizes = (f"{metric_name(name)} {_size(one['detectable'], metrics[name])}" for name, one in comparison.items())
        show.say(out, f"detectable difference (found in 80 of 100 such comparisons): {escape(', '.join(sizes))}")


def show_verdicts(
    out: Console, comparison: dict[str, Any], metrics: dict[str, Any], tuned: str = "tuned", base: str = "base"
) -> None:
    """Print the verdict on each metric, how sure it is, and how many rows it rests on."""
    table = Table(title=f"{tuned} against {base}, row by row", title_justify="left", box=None, padding=(0, 1))
    for column in ("metric", "verdict", f"{tuned} is better", "rows better", "worse"):
        table.add_column(column, justify="left" if column in ("metric", "verdict") else "right")
    for name, one in comparison.items():
        verdict = one["verdict"].split(" within")[0]
        text = f"equal within {_size(one['equal_within'], metrics[name])}" if verdict == "equal" else verdict
        color = COLORS.get(verdict, "default")
        rows = (str(one["rows"][side]) for side in ("better", "worse"))
        table.add_row(escape(metric_name(name)), f"[{color}]{text}[/{color}]", f"p = {one['probability']:.3f}", *rows)
    if comparison:
        out.print(table, soft_wrap=False)


def show_tasks(out: Console, tasks: dict[str, Any], called: Mapping[str, str]) -> None:
    """Print base against tuned on tasks of lm-eval; tasks whose group has a value of its own are left to the file.

    Args:
        out: The console to print on.
        tasks: `tasks` of evaluation.json.
        called: argument of `show_scores`.
    """
    shown = {name: values for name, values in tasks["metrics"].items() if values["group"] is None}
    comparison = {name: one for name, one in tasks["comparison"].items() if name in shown}
    show_detectable(out, comparison, shown)
    models = tuple(model for model in ("base", "tuned") if all(model in values for values in shown.values()))
    settings = tasks["settings"]
    chat = _chat(settings)
    if (other := _chat(settings.get("base", settings))) != chat:
        chat = f"{called['tuned']} {chat}, {called['base']} {other}"
    show.show_scores(out, f"tasks of lm-eval, {chat}, 95% intervals", shown, models, called)
    show_verdicts(out, comparison, shown, called["tuned"], called["base"])
    if hidden := len(tasks["metrics"]) - len(shown):
        out.print(f"       {hidden} more, of the groups' single tasks, are in the file")


def _chat(settings: dict[str, Any]) -> str:
    return "as turns of a chat" if settings["apply_chat_template"] else "without a chat template"


def show_turned(out: Console, evaluation: Any, called: Mapping[str, str]) -> None:
    """Print the first rows that got better and worse by the first metric that judges answers; `called` as above."""
    samples = evaluation.samples()
    judged = [one for one in evaluation.comparison.values() if one.rows == len(samples)]
    for title, rows in (("better", judged[0].better_rows), ("worse", judged[0].worse_rows)) if judged else ():
        out.print(
            f"[bold]rows that got {title}[/bold]  {len(rows)}" + (f", the first {SHOWN}" if len(rows) > SHOWN else "")
        )
        for row in rows[:SHOWN]:
            sample = samples[row]
            show.say(out, f"  [bold]{escape(sample['place'])}[/bold]  {_text(sample['prompt'])}", 4)
            for name in ("reference", "base", "tuned"):
                show.say(out, f"    {called.get(name, name):9}  {_text(sample[name])}", 15)


def show_gate(out: Console, gate: Sequence[dict[str, Any]]) -> None:
    """Print each bound of a gate beside what was measured."""
    if not gate:
        return
    show.show_checks(out, list(gate), title="gate")
    failed = [check["id"] for check in gate if not check["passed"]]
    if failed:
        show.say(out, f"[red]gate failed[/red]  not shown to hold: {escape(', '.join(failed))}")
    else:
        out.print("[green]gate passed[/green]")


def _size(difference: float, metric: dict[str, Any]) -> str:
    return f"{100 * difference:.1f} points" if metric.get("unit") == "share" else f"{difference:.3g}"


def _text(text: str) -> str:
    return escape(" ".join(text.split())[:WIDTH])
