"""Tables of evaluation.json: scores with intervals, answers to show, and the sentence that comes first."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.config.results import metric_name

SHOWN_BY = "the first two messages that the tuned model has right, and the first that it has wrong"
MODELS = {
    "base": "base",
    "base_with_examples": "base with examples",
    "tuned": "tuned",
    "exported": "exported",
    "difference": "tuned less base",
    "difference_with_examples": "tuned less base with examples",
}
# Shares whose unit evaluations of tasks without text do not name.
_SHARES = ("accuracy", "macro_f1", "entity_", "recall@", "mrr", "calibration_error", "rewards/accuracies")


def with_unit(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a metric's values with their unit."""
    return {"unit": "share" if name.startswith(_SHARES) else "", **values}


def shown_of(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose lines of samples.jsonl to show, by the rule SHOWN_BY."""
    right = [sample for sample in samples if sample["tuned_right"]]
    wrong = [sample for sample in samples if not sample["tuned_right"]]
    return right[:2] + wrong[:1]


def first_of(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page says first: the models' values by the metric that decides; empty: there is none."""
    if not evaluation.get("metrics"):
        return {}
    name, values = next(iter(evaluation["metrics"].items()))
    is_share = with_unit(name, values)["unit"] == "share"
    found: dict[str, Any] = {
        model: f"{100 * values[model]['value']:.0f} %" if is_share else f"{values[model]['value']:.3g}"
        for model in ("base", "base_with_examples", "tuned")
        if model in values
    }
    gain = values.get("difference_with_examples", values.get("difference"))
    better = values.get("better", "higher")
    what = "exactly right" if name in ("record", "exact_match") else f"by {metric_name(name)}"
    is_better = gain is not None and (gain["low"] > 0 if better == "higher" else bool(better) and gain["high"] < 0)
    return found | {"what": what, "is_better": is_better, "base_is": evaluation.get("compared_with") or "the base"}


def table_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of scores: its columns, and by metric the cells."""
    columns = [key for key in MODELS if any(key in values for values in metrics.values())]
    rows = {
        metric_name(name): [
            cell(with_unit(name, values)["unit"], values.get(key), key.startswith("difference")) for key in columns
        ]
        for name, values in metrics.items()
    }
    return {"columns": [MODELS[key] for key in columns], "rows": rows}


def cell(unit: str, value: Mapping[str, float] | None, is_difference: bool) -> tuple[str, str]:
    """Format a value and its interval."""
    if value is None:
        return "", ""
    sign = "+" if is_difference else ""
    if unit != "share":
        return f"{value['value']:{sign}.3g}", f"{value['low']:{sign}.3g} to {value['high']:{sign}.3g}"
    percent = "" if is_difference else " %"
    shown, low, high = (f"{100 * value[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{shown}{percent}", f"{low} to {high}"


def verdict_text(verdict: str, is_share: bool) -> str:
    """Return a verdict for a reader: within so many points, of a share."""
    found = re.fullmatch(r"equal within ([\d.e-]+)", verdict)
    return f"equal within {100 * float(found[1]):.1f} points" if found and is_share else verdict


def held_out_pairs(records: Sequence[Mapping[str, Any]]) -> str:
    """Return margin and accuracy of the last evaluation of pairs with their 95% intervals; empty: there is none."""
    last = next((record for record in reversed(records) if "intervals" in record), None)
    if last is None:
        return ""
    parts = []
    for name, called in {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}.items():
        if last.get(name) is not None:
            low, high = last["intervals"].get(name, (None, None))
            span = "" if low is None else f" ({low:.3g} to {high:.3g})"
            parts.append(f"{called} {last[name]:.3g}{span}")
    return ", ".join(parts)
