"""What the demo prints: in 80 columns, for a terminal and for a log file alike."""

import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from veneer.cli import show

WIDTH = 78
MODELS = ("base", "base_with_examples", "tuned")
LIVE_AT = (0.25, 0.5, 0.75)  # shares of the steps after which the model answers the first held-out message


class LiveAnswers:
    """A listener that prints what the model answers to one message while it is being trained.

    Args:
        out: The console to print on.
        steps: Steps of the whole run.
        answer: Function that answers the message with the model as it is.
    """

    def __init__(self, out: Console, steps: int, answer: Callable[[], str]) -> None:
        self._out, self._answer = out, answer
        self._due = [round(share * steps) for share in LIVE_AT]

    def __call__(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train" and self._due and record["step"] >= self._due[0]:
            self._due.pop(0)
            answer = self._answer()
            self._out.print(f"   after step {record['step']} it answers")
            paragraph(self._out, answer)


def paragraph(out: Console, text: str, label: str = "") -> None:
    """Print any text behind a label, wrapped and indented, on at most three lines."""
    first = f"     {label:10}" if label else "     "
    flat = " ".join(text.split()) or "(nothing)"
    lines = textwrap.wrap(
        flat, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), max_lines=3, placeholder=" ..."
    )
    for line in lines:
        out.print(escape(line))


def show_right(out: Console, results: Mapping[str, Any]) -> None:
    """Print in one line the metric that decides, and the share of answers that are valid JSON."""
    texts = {"record": "exactly right", "valid_json": "valid JSON"}
    names = [name for n, name in enumerate(results) if n == 0 or name == "valid_json"]
    scores = (
        f"{texts.get(name, name.replace('_', ' '))} {show.interval(result.unit, result.interval.as_dict())}"
        for name, result in ((name, results[name]) for name in names)
    )
    out.print("   " + ", ".join(scores))


def show_results(out: Console, evaluation: dict[str, Any]) -> None:
    """Print all scores of the three models, and what training gained over examples in the prompt."""
    metrics = {
        name: {which.replace("base_with", "with"): value for which, value in values.items()}
        for name, values in evaluation["metrics"].items()
    }
    for values in metrics.values():
        values["difference"] = values.get("difference_with_examples", values["difference"])
    title = f"{evaluation['rows']} held-out messages, share right (95% interval)"
    models = tuple(name.replace("base_with", "with") for name in MODELS)
    show.show_scores(out, title, metrics, models)
    out.print("   record: all keys right. with examples: the base with three training rows in")
    out.print("   its prompt. difference: tuned less that, in points, on the same messages.")


def show_exported(out: Console, file: Path, size: int, seconds: float, exported: dict[str, Any]) -> None:
    """Print how the exported file answers, against the tuned model."""
    out.print(f"   {escape(str(file))}, {size / 1e6:.0f} MB, {exported['rows']} answers in {seconds:.0f} s")
    turned = f"{exported['wrong_to_right']} turned right, {exported['right_to_wrong']} wrong"
    difference = show.interval("share", exported["difference"], is_difference=True)
    out.print(f"   against the tuned model: [bold]{exported['verdict']}[/bold]")
    out.print(f"   {turned}, difference {difference} points")


def show_examples(out: Console, samples: Sequence[dict[str, Any]], rule: str) -> None:
    """Print some answers side by side."""
    out.print("[bold]answers[/bold]")
    paragraph(out, rule)
    for sample in samples:
        mark = "[green]right[/green]" if sample["tuned_right"] else "[red]wrong[/red]"
        out.print(f"   {mark}")
        paragraph(out, sample["prompt"], "message")
        paragraph(out, sample["base"], "base")
        if "base_with_examples" in sample:
            paragraph(out, sample["base_with_examples"], "examples")
        paragraph(out, sample["tuned"], "tuned")
        if not sample["tuned_right"]:
            paragraph(out, sample["reference"], "should be")


def show_pair(out: Console, pair: dict[str, str]) -> None:
    """Print one pair."""
    for name, label in (("prompt", "message"), ("chosen", "chosen"), ("rejected", "rejected")):
        paragraph(out, pair[name], label)


def show_win_rate(out: Console, result: dict[str, Any], turned: Sequence[dict[str, Any]]) -> None:
    """Print how often the run before and after preference training is right, its win rate, and answers that turned.

    Args:
        out: The console to print on.
        result: The evaluation's result, with `win_rate`.
        turned: Answers of which one is right and the other wrong.
    """
    title = f"{result['rows']} test messages, share right (95% interval)"
    show.show_scores(out, title, result["metrics"], ("base", "tuned"), {"base": "sft", "tuned": "dpo"})
    out.print("   record: all keys right. difference: dpo less sft, in points, on the same messages.")
    for sample in turned[:3]:
        out.print("   [green]now right[/green]" if sample["tuned_right"] else "   [red]now wrong[/red]")
        paragraph(out, sample["prompt"], "message")
        paragraph(out, sample["base"], "sft")
        paragraph(out, sample["tuned"], "dpo")
    rate = result["win_rate"]
    shown = show.interval("share", rate["win_rate"])
    out.print(f"   dpo wins {rate['wins']}, ties {rate['ties']}, loses {rate['losses']} of {rate['rows']} messages")
    out.print(f"   [bold]win rate of dpo over sft {shown}, ties counted half: {rate['verdict']}[/bold]")


def show_next(out: Console, folder: Path, prompt: str) -> None:
    """Print the run's files and commands to go on with; none of them changes the run's folder."""
    veneer = show.command_name()
    out.print(f"[bold]files[/bold] in {escape(str(folder))}")
    out.print("   report.html adapter/ gguf/ evaluation.json samples.jsonl metrics.jsonl")
    out.print("   loss.png ledger.json plan.json run.yaml")
    out.print("[bold]next[/bold]")
    for command in (
        f"generate {folder} --compare --prompt {shlex.quote(prompt)}",
        f"merge {folder} --out {folder}-merged",
        f"train {folder}/run.yaml data.train=yours.jsonl data.validation=0.1 train.output_dir=runs/yours",
    ):
        out.print(f"   {veneer} {command}", markup=False)
    out.print(f"[bold]report[/bold]  {escape(str(folder / 'report.html'))}")
