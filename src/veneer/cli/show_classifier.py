"""Shows what a classifier's evaluation found."""

from typing import Any

from rich.markup import escape
from rich.table import Table

WIDEST = 12  # labels whose confusions are shown


def show_classifier(out: Any, result: dict[str, Any]) -> None:
    """Print metrics, labels and confusions.

    Args:
        out: console.
        result: `EvaluatedClassifier.as_dict()`.
    """
    table = Table(title=f"{result['rows']} held-out rows, 95% intervals; base: {result['compared_with']}", box=None)
    for heading in ("", "base", "tuned", "difference"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, values in result["metrics"].items():
        table.add_row(name, *(_interval(values.get(who)) for who in ("base", "tuned", "difference")))
    out.print(table)
    if "labels" in result:
        _show_labels(out, result)
    elif "by_type" in result:
        _show_types(out, result["by_type"])
    if result["file"] is not None:
        out.print(f"files  {result['file']} samples.jsonl", markup=False)


def _show_types(out: Any, by_type: dict[str, Any]) -> None:
    """Print the scores of each type of entity."""
    table = Table(box=None, title="entities by type")
    for heading in ("type", "entities", "precision", "recall", "f1"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for name, found in by_type.items():
        table.add_row(
            escape(name), str(found["entities"]), *(_interval(found[s]) for s in ("precision", "recall", "f1"))
        )
    out.print(table)


def _show_labels(out: Any, result: dict[str, Any]) -> None:
    """Print the labels, and what their rows were given."""
    labels, matrix = result["labels"], result["confusions"]
    table = Table(box=None, title="labels, and what their rows were given")
    shown = labels if len(labels) <= WIDEST else []
    for heading in ("label", "rows", "precision", "recall", "f1", *shown):
        table.add_column(escape(heading), justify="left" if heading == "label" else "right", no_wrap=heading == "label")
    for number, (label, found) in enumerate(result["by_label"].items()):
        shares = (f"{found[name]:.3f}" for name in ("precision", "recall", "f1"))
        table.add_row(escape(label), str(found["rows"]), *shares, *(str(n) for n in matrix[number] if shown))
    out.print(table)


def _interval(values: dict[str, float] | None) -> str:
    return "" if values is None else f"{values['value']:.3f} ({values['low']:.2f}-{values['high']:.2f})"
