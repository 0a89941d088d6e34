"""Curves of a run on pairs of answers: margin, accuracy and log-probabilities by optimizer step, from its records."""

from collections.abc import Iterable, Sequence
from typing import Any

from veneer.report.plots import smooth

WIDTH, HEIGHT = 720, 150  # pixels
LEFT, BOTTOM = 54, 22  # room for its axes
# Title, and the metrics that are drawn together with what each is called.
CURVES = (
    ("Margin of rewards", {"rewards/margins": "chosen less rejected"}),
    ("Accuracy: share of the pairs with a margin above 0", {"rewards/accuracies": "share"}),
    ("Log-probability of an answer", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
)
TOLD = {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}


def are_pairs(records: Iterable[dict[str, Any]]) -> bool:
    """Return whether records are of a run on pairs."""
    return any("rewards/accuracies" in record for record in records)


def pair_curves(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a page draws of each curve: running means of the steps, held-out values with intervals, axes.

    Args:
        records: the lines of metrics.jsonl.
    """
    return [curve for title, names in CURVES if (curve := _curve(records, title, names)) is not None]


def held_out_text(records: Sequence[dict[str, Any]]) -> str:
    """Return margin and accuracy of the last evaluation with their 95% intervals; empty: there is none."""
    last = next((record for record in reversed(records) if record["kind"] == "eval" and "intervals" in record), None)
    if last is None:
        return ""
    parts = []
    for name, called in TOLD.items():
        if last.get(name) is not None:
            low, high = last["intervals"].get(name, (None, None))
            span = "" if low is None else f" ({low:.3g} to {high:.3g})"
            parts.append(f"{called} {last[name]:.3g}{span}")
    return ", ".join(parts)


def _curve(records: Sequence[dict[str, Any]], title: str, names: dict[str, str]) -> dict[str, Any] | None:
    series: list[dict[str, Any]] = []
    for name, called in names.items():
        known = [record for record in records if record.get(name) is not None]
        trained = [record for record in known if record["kind"] == "train"]
        means = smooth([record[name] for record in trained])
        dots = [
            (record["step"], record[name], *record.get("intervals", {}).get(name, [record[name]] * 2))
            for record in known
            if record["kind"] == "eval"
        ]
        steps = [record["step"] for record in trained]
        series.append({"called": called, "line": list(zip(steps, means, strict=True)), "dots": dots})
    values = [value for one in series for _, value in one["line"]]
    values += [value for one in series for dot in one["dots"] for value in dot[1:]]
    if not any(one["line"] for one in series):
        return None
    low, high = float(min(0.0, *values) if min(values) >= 0 else min(values)), float(max(values))
    last: int = max(step for one in series for step, _ in one["line"])
    span = float(high - low) or 1.0

    def across(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 8) * step / last, 1)

    def down(value: float) -> float:
        return round(8 + (HEIGHT - BOTTOM - 8) * (1 - (value - low) / span), 1)

    for one in series:
        one["line"] = " ".join(f"{across(step)},{down(value)}" for step, value in one["line"])
        one["dots"] = [
            {"x": across(step), "y": down(value), "low": down(least), "high": down(most), "text": f"{value:.3g}"}
            for step, value, least, most in one["dots"]
        ]
    return {
        "title": title,
        "series": series,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "marks": [(down(value), _label(value)) for value in (low, low + span / 2, low + span)],
        "last": last,
    }


def _label(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
