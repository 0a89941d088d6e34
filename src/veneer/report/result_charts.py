"""Charts of what is not a curve over steps: memory, events, scores with intervals, a confusion matrix, several runs."""

from collections.abc import Sequence
from typing import Any

from veneer.report.charts import ACCENT, BAD, HEAT, INK, PALE, PLAIN, SOFT, STEP, Spec, spec_of
from veneer.report.run_files import RunFiles
from veneer.report.series import Point, is_number, points_of, rounded, running_mean, thin
from veneer.report.timeline import KINDS, Event

MIB = 2**20
MOST_LABELS = 30  # of a confusion matrix
RUNS = [f"var(--run-{n})" for n in range(8)]
MODELS = {"base": "base", "base_with_examples": "base with examples", "tuned": "tuned", "exported": "exported"}


def memory(run: RunFiles) -> Spec | None:
    """Draw the measured and the predicted peak of memory, and what the prediction is made of."""
    peaks = [one["peak_bytes"] for one in run.trained if is_number(one.get("peak_bytes"))]
    parts = run.plan.get("components")
    predicted = run.plan.get("peak_bytes")
    rows = [("measured peak", max(peaks), "measured")] if peaks else []
    rows += [("predicted peak", predicted, "predicted")] if is_number(predicted) else []
    if isinstance(parts, dict):
        sizes = sorted(((name, size) for name, size in parts.items() if is_number(size)), key=lambda one: -one[1])
        rows += [(name, size, "part") for name, size in sizes if size >= 0.005 * sizes[0][1]]
    if not rows or max(size for _, size, _ in rows) <= 0:
        return None
    values = [
        {"name": name, "mib": round(size / MIB, 1), "kind": kind, "text": size_text(size)} for name, size, kind in rows
    ]
    most = max(one["mib"] for one in values) or 1.0
    colours = {"domain": ["measured", "predicted", "part"], "range": [ACCENT, SOFT, PALE]}
    at: Spec = {
        "y": {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 150}},
        "x": {"field": "mib", "type": "quantitative", "axis": None, "scale": {"domainMax": 1.22 * most}},
    }
    colour = {"field": "kind", "type": "nominal", "scale": colours, "legend": None}
    data = {"values": values}
    bars = {"data": data, "mark": {"type": "bar", "height": 10, "cornerRadius": 2}, "encoding": at | {"color": colour}}
    text = {"data": data, "mark": {"type": "text", "align": "left", "dx": 5, "color": INK}}
    return spec_of([bars, text | {"encoding": at | {"text": {"field": "text"}}}], 21 * len(values))


def size_text(size: float) -> str:
    """Return bytes as a person reads them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}" if size < 10 * scale else f"{size / scale:.1f} {unit}"
    return f"{size / 1024:.1f} KiB"


def timeline(events: Sequence[Event], steps: int) -> Spec | None:
    """Draw what happened at which step, a row a kind."""
    kinds = [kind for kind in KINDS if any(event.kind == kind for event in events)]
    if not kinds or not steps:
        return None
    colours = [BAD if kind in ("error", "warning", "divergence", "memory") else ACCENT for kind in kinds]
    values = [
        {"step": one.step, "kind": one.kind, "what": one.message[:300], "time": one.clock} for one in events[-1000:]
    ]
    across = STEP | {"scale": {"domain": [0, steps], "nice": False}}
    encoding: Spec = {
        "x": across,
        "y": {"field": "kind", "type": "nominal", "sort": kinds, "title": None, "axis": {"grid": True}},
        "color": {"field": "kind", "type": "nominal", "scale": {"domain": kinds, "range": colours}, "legend": None},
        "tooltip": [{"field": key} for key in ("step", "time", "what")],
    }
    mark = {"type": "point", "filled": True, "size": 60, "opacity": 0.9, "clip": False}
    return spec_of([{"data": {"values": values}, "mark": mark, "encoding": encoding}], 26 * len(kinds) + 4)


def comparison(values: dict[str, Any]) -> Spec | None:
    """Draw a metric of each model with its 95% interval, on one scale; None where a number is missing."""
    models = {key: values[key] for key in MODELS if isinstance(values.get(key), dict)}
    if len(models) < 2 or not all(
        is_number(one.get(end)) for one in models.values() for end in ("low", "value", "high")
    ):
        return None
    is_share = values.get("unit") == "share"
    form = ".0%" if is_share else ".3~g"
    rows = [
        {"model": MODELS[key], **{end: rounded(one[end]) for end in ("low", "value", "high")}, "kind": key}
        for key, one in models.items()
    ]
    for row in rows:
        row["text"] = f"{row['value']:.1%}" if is_share else f"{row['value']:.4g}"
    scale = {"domain": [0, 1]} if is_share else {"zero": False, "padding": 30}
    y = {
        "field": "model",
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelLimit": 130, "minExtent": 110},
    }
    is_tuned = "datum.kind == 'tuned'"
    colour = {"condition": {"test": is_tuned, "value": ACCENT}, "value": SOFT}
    x = {
        "field": "value",
        "type": "quantitative",
        "title": None,
        "scale": scale,
        "axis": {"format": form, "tickCount": 5},
    }
    data = {"values": rows}
    told = [{"field": key} for key in ("model", "value", "low", "high")]
    spans = {"y": y, "x": x | {"field": "low"}, "x2": {"field": "high"}, "color": colour}
    dots = {"y": y, "x": x, "color": colour, "tooltip": told}
    text = {"type": "text", "baseline": "bottom", "dy": -6, "color": INK}
    layers: list[Spec] = [
        {"data": data, "mark": {"type": "rule", "strokeWidth": 4, "opacity": 0.35}, "encoding": spans},
        {"data": data, "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1}, "encoding": dots},
        {"data": data, "mark": text, "encoding": {"y": y, "x": x, "text": {"field": "text"}}},
    ]
    return spec_of(layers, 34 * len(rows))


def confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> Spec | None:
    """Draw how often each right label was given each predicted one; colours are shares of the right label's rows."""
    if not labels or len(labels) > MOST_LABELS:
        return None
    values = []
    for right, row in zip(labels, matrix, strict=True):
        total = sum(row)
        for given, count in zip(labels, row, strict=True):
            share = count / total if total else 0.0
            values.append({"right": right, "predicted": given, "rows": count, "share": round(share, 4)})
    edges = [0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9]
    order = list(labels)
    axis = {"labelLimit": 110, "orient": "top", "labelAngle": -40 if len(labels) > 4 else 0, "domain": False}
    at: Spec = {
        "x": {"field": "predicted", "type": "nominal", "sort": order, "title": "predicted", "axis": axis},
        "y": {"field": "right", "type": "nominal", "sort": order, "title": "right", "axis": {"labelLimit": 110}},
    }
    colour: Spec = {"field": "share", "type": "quantitative", "legend": None}
    colour["scale"] = {"type": "threshold", "domain": edges, "range": HEAT}
    told = [{"field": key} for key in ("right", "predicted", "rows")] + [{"field": "share", "format": ".1%"}]
    cells = {"mark": {"type": "rect", "stroke": "var(--paper)"}, "encoding": at | {"color": colour, "tooltip": told}}
    layers: list[Spec] = [{"data": {"values": values}} | cells]
    if len(labels) <= 12:
        paper = {"condition": {"test": "datum.share >= 0.5", "value": "var(--paper)"}, "value": INK}
        counts = {"data": {"values": [one for one in values if one["rows"]]}, "mark": {"type": "text"}}
        layers.append(counts | {"encoding": at | {"text": {"field": "rows"}, "color": paper}})
    return spec_of(layers, max(110, min(560, 34 * len(labels))))


def lengths(ledger: dict[str, Any]) -> Spec | None:
    """Draw how many rows have how many tokens."""
    bars = (ledger.get("lengths") or {}).get("histogram") or []
    values = [one for one in bars if all(is_number(one.get(key)) for key in ("from", "to", "rows"))]
    if not any(one["rows"] for one in values):
        return None
    x: Spec = {"field": "from", "type": "quantitative", "title": "tokens of a row", "scale": {"nice": False}}
    y = {"field": "rows", "type": "quantitative", "title": None, "axis": {"format": "~s"}}
    x["axis"] = {"tickCount": 8}
    told = [{"field": "from", "title": "from"}, {"field": "to", "title": "below"}, {"field": "rows", "title": "rows"}]
    encoding = {"x": x, "x2": {"field": "to"}, "y": y, "y2": {"datum": 0}, "tooltip": told}
    bars_of = {"type": "rect", "fill": ACCENT, "stroke": "var(--paper)", "strokeWidth": 1}
    return spec_of([{"data": {"values": values}, "mark": bars_of, "encoding": encoding}], 130)


def overlaid(runs: Sequence[tuple[str, RunFiles]], kind: str) -> Spec | None:
    """Draw the losses of several runs on one plane: training (running means) or held-out ones."""
    values, names = [], []
    for name, run in runs:
        records = run.trained if kind == "train" else run.held_out
        points: list[Point] = points_of(records, "loss")
        drawn = thin(running_mean(points) if kind == "train" else points, 300)
        values += [{"run": name, "step": step, "value": rounded(value)} for step, value in drawn]
        names.append(name)
    if not values:
        return None
    colour: Spec = {"field": "run", "type": "nominal", "scale": {"domain": names, "range": RUNS}}
    colour["legend"] = {"columns": 2, "labelLimit": 300, "symbolType": "stroke"}
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}, "axis": {"format": PLAIN}}
    told = [{"field": "run"}, {"field": "step"}, {"field": "value", "title": "loss"}]
    encoding = {"x": STEP, "y": y, "color": colour, "tooltip": told}
    mark: Spec = {"type": "line", "strokeWidth": 2, "point": kind == "eval" and {"filled": True, "size": 40}}
    return spec_of([{"data": {"values": values}, "mark": mark, "encoding": encoding}], 260)
