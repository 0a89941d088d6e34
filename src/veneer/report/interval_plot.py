"""A plot for each comparison: base and tuned model with their 95% intervals on one scale, and the verdict beside them.

The intervals of two models may overlap where the paired difference is beyond doubt, so the verdict is written out.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from veneer.config.results import metric_name

WIDTH, LEFT, RIGHT = 720, 190, 16  # pixels; names of models stand on the left
SHOWN = {"base": "base", "base_with_examples": "base with examples", "tuned": "tuned", "exported": "exported"}


def interval_plots(metrics: Mapping[str, Any], verdicts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the page draws of each metric or suite: its name, verdict, ends of the scale, and marks by model.

    Args:
        metrics: values with intervals, by metric and model, as in evaluation.json.
        verdicts: comparisons with a `verdict` each, by metric.
    """
    return [
        plot
        for name, values in metrics.items()
        if (plot := _plot(name, values, verdicts.get(name, {}).get("verdict", ""))) is not None
    ]


def _plot(name: str, values: Mapping[str, Any], verdict: str) -> dict[str, Any] | None:
    """Return one plot; None where a value is not finite."""
    models = {key: values[key] for key in SHOWN if key in values}
    numbers = [model[end] for model in models.values() for end in ("low", "value", "high")]
    if not numbers or not all(number is not None and math.isfinite(number) for number in numbers):
        return None
    is_share = values.get("unit") == "share"
    low, high = (0.0, 1.0) if is_share else (min(numbers), max(numbers))
    span = (high - low) or 1.0

    def across(number: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (number - low) / span, 1)

    marks = [
        {
            "model": SHOWN[key],
            "is_tuned": key == "tuned",
            **{end: across(model[end]) for end in ("low", "value", "high")},
            "text": f"{100 * model['value']:.1f} %" if is_share else f"{model['value']:.3g}",
        }
        for key, model in models.items()
    ]
    return {
        "name": metric_name(name),
        "verdict": _verdict(verdict, is_share),
        "is_better": verdict == "better",
        "is_worse": verdict == "worse",
        "ends": ("0 %", "100 %") if is_share else (f"{low:.3g}", f"{high:.3g}"),
        "marks": marks,
        "width": WIDTH,
        "left": LEFT,
        "right": WIDTH - RIGHT,
    }


def _verdict(verdict: str, is_share: bool) -> str:
    """Return a verdict for a reader: within so many points, of a share."""
    found = re.fullmatch(r"equal within ([\d.e-]+)", verdict)
    return f"equal within {100 * float(found[1]):.1f} points" if found and is_share else verdict
