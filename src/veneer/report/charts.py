"""Charts of a run as Vega-Lite specifications: plain dicts, one function a chart, None where there is nothing to draw.

Vega-Lite (BSD, vendor/) draws all that a run has, of one kind of specification: lines with points beside them, bands,
a heat map, a strip of events, intervals, a matrix; as SVG, which prints. uPlot is a tenth of its size, but draws lines
alone; Observable Plot would need a second library for what reacts to the pointer; ECharts draws on a canvas. The 830 kB
are what a page costs, whatever the run's length, since series are thinned out first (series.py).

Colours are CSS variables of the page (report.css), which browsers resolve where they stand in an SVG. So one
specification serves light, dark and paper, and nothing is drawn again when that changes; scales that would compute with
colours have steps instead. Data goes into specifications as values alone, never into expressions.
"""

import math
from collections.abc import Sequence
from typing import Any

from veneer.report.run_files import RunFiles
from veneer.report.series import Point, is_number, points_of, rounded, running_mean, thin

Spec = dict[str, Any]
INK, SOFT, PALE, ACCENT, BAD = (f"var(--{name})" for name in ("ink", "soft", "pale", "accent", "bad"))
HEAT = [f"var(--heat-{n})" for n in range(9)]
FROM_0: Spec = {"scale": {"zero": True}}
MOST_COLUMNS = 60  # of a heat map
AXIS = {"tickMinStep": 1, "tickCount": 6, "format": "d"}
STEP = {"field": "step", "type": "quantitative", "title": "step", "scale": {"nice": False, "zero": True}, "axis": AXIS}
PLAIN = ".6~g"  # a number with the digits that it has
NO_SHARES = ("loss", "perplexity", "nll_loss", "log_odds_ratio", "log_odds_chosen", "kl", "best_value")
CONFIG: Spec = {
    "background": None,
    "font": "system-ui, -apple-system, 'Segoe UI', sans-serif",
    "padding": {"left": 0, "right": 2, "top": 3, "bottom": 4},
    "view": {"stroke": None},
    "axis": {
        "domain": False,
        "ticks": False,
        "gridColor": "var(--line)",
        "labelColor": SOFT,
        "titleColor": SOFT,
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "labelPadding": 6,
        "labelFlush": True,
    },
    "axisX": {"grid": False, "domain": True, "domainColor": "var(--line)", "titleAnchor": "end", "titlePadding": 2},
    "axisY": {"tickCount": 4},
    "text": {"color": SOFT, "fontSize": 11},
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": SOFT,
        "titleColor": SOFT,
        "labelFontSize": 11,
        "symbolSize": 60,
        "offset": 4,
    },
}


def spec_of(layers: Sequence[Spec], height: int = 200, **more: Any) -> Spec:
    """Return a chart of layers on one plane, as wide as the place that it stands in."""
    return {"width": "container", "height": height, "autosize": {"type": "fit-x", "contains": "padding"}} | (
        {"layer": list(layers)} | more
    )


def loss(run: RunFiles) -> Spec | None:
    """Draw the loss: each step, the running mean, held-out rows with their interval."""
    return _curves(run, {"loss": ""}, "loss")


def _curves(run: RunFiles, names: dict[str, str], title: str, **y: Any) -> Spec | None:
    """Draw training means and held-out values of metrics, the first in the accent's colour where there are two."""
    layers: list[Spec] = []
    for number, (key, called) in enumerate(names.items()):
        trained = points_of(run.trained, key)
        held_out = [one for one in run.held_out if is_number(one.get(key))]
        is_alone = len(names) == 1
        dots = ACCENT if number == 0 else SOFT
        line = SOFT if is_alone and held_out else dots
        name = f"{called} " if called else ""
        if trained and is_alone and len(trained) > 10:
            layers.append(_line(thin(trained), "each step", PALE, 1, title, y))
        if trained:
            mean = "running mean" if len(trained) > 10 else "each step"
            layers.append(_line(thin(running_mean(trained)), f"{name}{mean}", line, 2, title, y))
        if held_out:
            layers += _held_out(held_out, key, dots, f"{name}held-out", title, y)
    if not layers:
        return None
    return spec_of([*layers, *_pointer(run, names)])


def _line(points: Sequence[Point], series: str, colour: str, width: float, title: str, y: dict[str, Any]) -> Spec:
    values = [{"step": step, "value": rounded(value)} for step, value in points]
    return {
        "data": {"values": values},
        "mark": {"type": "line", "stroke": colour, "strokeWidth": width, "description": series},
        "encoding": {"x": STEP, "y": _y(title) | y},
    }


def _held_out(records: Sequence[dict[str, Any]], key: str, colour: str, name: str, title: str, y: Any) -> list[Spec]:
    values = []
    for one in thin([(n, record[key]) for n, record in enumerate(records)], 200):
        record = records[int(one[0])]
        low, high = (record.get("intervals") or {}).get(key) or (record[key], record[key])
        values.append({"step": record["step"], "value": rounded(record[key]), "low": low, "high": high})
    data = {"values": values}
    at = {"x": STEP, "y": {"field": "low", **_y(title), **y} | {"field": "low"}, "y2": {"field": "high"}}
    dots = {"type": "point", "filled": True, "size": 45 if len(values) <= 60 else 14, "opacity": 1, "color": colour}
    band = (
        {"type": "area", "fill": colour, "fillOpacity": 0.16} if len(values) > 1 else {"type": "rule", "color": colour}
    )
    has_interval = any(one["low"] != one["high"] for one in values)
    return [
        *([{"data": data, "mark": band, "encoding": at}] if has_interval else []),
        {
            "data": data,
            "mark": {"type": "line", "stroke": colour, "strokeWidth": 1.5, "description": name},
            "encoding": {"x": STEP, "y": _y(title) | y},
        },
        {"data": data, "mark": dots, "encoding": {"x": STEP, "y": _y(title) | y}},
    ]


def _y(title: str, field: str = "value") -> Spec:
    return {"field": field, "type": "quantitative", "title": None, "scale": {"zero": False}, "axis": {"format": PLAIN}}


def _pointer(run: RunFiles, names: dict[str, str]) -> list[Spec]:
    """Return what shows the numbers of the nearest record under the pointer."""
    shown = {"step": "step"} | {key: called or key for key, called in names.items()}
    records = [one for one in run.records if one["kind"] in ("train", "eval") and is_number(one.get(next(iter(names))))]
    kept = thin([(n, one[next(iter(names))]) for n, one in enumerate(records)], 400)
    values = []
    for n, value in kept:
        record = records[int(n)]
        kind = {"of": "held-out rows" if record["kind"] == "eval" else "training step"}
        numbers = {f"m{m}": rounded(record[key]) for m, key in enumerate(names) if is_number(record.get(key))}
        values.append({"step": record["step"], "value": rounded(value), **kind, **numbers})
    told = [{"field": "step", "title": "step"}, {"field": "of", "title": "of"}]
    told += [{"field": f"m{m}", "title": title} for m, title in enumerate(list(shown.values())[1:])]
    return [under_pointer(values, told)]


def under_pointer(values: Sequence[dict[str, Any]], told: Sequence[Spec], y: Spec | None = None) -> Spec:
    """Return points that appear under the pointer, the nearest by step, with what a tooltip tells of them."""
    nearest = {"type": "point", "on": "pointermove", "nearest": True, "encodings": ["x"], "clear": "pointerout"}
    return {
        "data": {"values": list(values)},
        "params": [{"name": "pointed", "select": nearest}],
        "mark": {"type": "point", "filled": True, "size": 70, "color": INK},
        "encoding": {
            "x": STEP,
            "y": y or _y(""),
            "opacity": {"condition": {"param": "pointed", "empty": False, "value": 1}, "value": 0},
            "tooltip": list(told),
        },
    }


def pair_charts(run: RunFiles) -> list[tuple[str, str, Spec]]:
    """Return title, what it shows and chart of margins, accuracy and log-probabilities of pairs."""
    wanted = (
        ("Margin of rewards", "chosen less rejected", {"rewards/margins": ""}),
        ("Rewards", "chosen and rejected answers", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
        ("Accuracy: share of the pairs with a margin above 0", "", {"rewards/accuracies": ""}),
        (
            "Log-probability of an answer",
            "chosen and rejected",
            {"logps/chosen": "chosen", "logps/rejected": "rejected"},
        ),
    )
    found = ((title, what, _curves(run, names, title)) for title, what, names in wanted)
    return [(title, what, spec) for title, what, spec in found if spec is not None]


def learning_rate(run: RunFiles) -> Spec | None:
    """Draw the learning rate."""
    points = points_of(run.trained, "learning_rate")
    return _single(points, "learning rate", FROM_0 | {"axis": {"format": "~e"}}, is_exact=True) if points else None


def grad_norm(run: RunFiles) -> Spec | None:
    """Draw the norm of the gradient before clipping, and the norm that it is clipped to."""
    points = points_of(run.trained, "grad_norm")
    limit = run.section("train").get("max_grad_norm")
    if not points:
        return None
    spec = _single(points, "norm", FROM_0)
    if is_number(limit) and 0 < limit <= 3 * max(value for _, value in points):
        spec["layer"] += rule(limit, f"clipped to {limit:g}", FROM_0)
    return spec


def trained_share(run: RunFiles) -> Spec | None:
    """Draw the share of each step's tokens that count in the loss."""
    points = [
        (one["step"], one["trained_tokens"] / one["tokens"])
        for one in run.trained
        if is_number(one.get("tokens")) and is_number(one.get("trained_tokens")) and one["tokens"]
    ]
    return _single(points, "trained", FROM_0 | {"axis": {"format": ".0%"}}) if points else None


def speed(run: RunFiles) -> Spec | None:
    """Draw tokens per second, and what the plan said."""
    points = points_of(run.trained, "tokens_per_second")
    if not points:
        return None
    y = FROM_0 | {"axis": {"format": "~s"}}
    spec = _single(points, "tokens/s", y)
    planned, seconds = run.plan.get("tokens_per_second"), run.plan.get("step_seconds") or {}
    if is_number(planned):
        spec["layer"] += rule(planned, f"plan: {planned:,.0f}", y)
        tokens = (run.plan.get("rows") or {}).get("tokens")
        if is_number(tokens) and is_number(seconds.get("low")) and is_number(seconds.get("high")):
            ends = {"low": tokens / seconds["high"], "high": tokens / seconds["low"]}
            band = {"y": _y("", "low") | y, "y2": {"field": "high"}}
            mark = {"type": "rect", "fill": SOFT, "fillOpacity": 0.12}
            spec["layer"].insert(0, {"data": {"values": [ends]}, "mark": mark, "encoding": band})
    return spec


def _single(points: Sequence[Point], title: str, y: dict[str, Any], is_exact: bool = False) -> Spec:
    """Draw one series, with its running mean unless it has no noise."""
    is_noisy = len(points) > 10 and not is_exact
    layers = [_line(thin(points), "each step", PALE if is_noisy else ACCENT, 1 if is_noisy else 2, title, y)]
    if is_noisy:
        layers.append(_line(thin(running_mean(points)), "running mean", ACCENT, 2, title, y))
    shown = [{"step": step, "value": rounded(value)} for step, value in thin(points, 300)]
    told = [{"field": "step", "title": "step"}, {"field": "value", "title": title}]
    return spec_of([*layers, under_pointer(shown, told, _y(title) | y)], 150)


def rule(value: float, text: str, y: Spec) -> list[Spec]:
    """Return a dashed line across a chart, with its name."""
    data, at = {"values": [{"value": value, "text": text}]}, {"y": _y("") | y}
    right = {"type": "text", "align": "right", "baseline": "bottom", "dy": -3, "x": "width", "color": INK}
    return [
        {"data": data, "mark": {"type": "rule", "strokeDash": [4, 3], "stroke": INK}, "encoding": at},
        {"data": data, "mark": right, "encoding": at | {"text": {"field": "text"}}},
    ]


def grad_norm_by_layer(run: RunFiles) -> Spec | None:
    """Draw the gradient's norm of each decoder layer over the steps; of many steps, the mean of a few in a column."""
    records = [one for one in run.trained if isinstance(one.get("grad_norm_by_layer"), list)]
    if not records:
        return None
    count = min(MOST_COLUMNS, len(records))
    values = []
    for column in range(count):
        some = records[len(records) * column // count : len(records) * (column + 1) // count]
        following = len(records) * (column + 1) // count
        end = records[following]["step"] if following < len(records) else some[-1]["step"] + 1
        for layer in range(max(len(one["grad_norm_by_layer"]) for one in some)):
            norms = [one["grad_norm_by_layer"][layer] for one in some if layer < len(one["grad_norm_by_layer"])]
            norms = [norm for norm in norms if is_number(norm)]
            if norms:
                mean = float(f"{sum(norms) / len(norms):.3g}")
                values.append({"step": some[0]["step"], "end": end, "layer": layer, "above": layer + 1, "norm": mean})
    layers = 1 + max((one["layer"] for one in values), default=-1)
    if layers < 2:
        return None
    last = max(one["end"] for one in values)
    across = STEP | {"scale": {"domain": [values[0]["step"], last], "nice": False, "zero": False}}
    down: Spec = {
        "field": "layer",
        "type": "quantitative",
        "title": "layer",
        "scale": {"domain": [0, layers], "nice": False},
    }
    down["axis"] = {"tickMinStep": 1, "format": "d", "grid": False, "titleAnchor": "end"}
    colour = {"type": "threshold", "domain": _edges([one["norm"] for one in values]), "range": HEAT}
    cells = {
        "data": {"values": values},
        "mark": {"type": "rect", "stroke": None},
        "encoding": {
            "x": across,
            "x2": {"field": "end"},
            "y": down,
            "y2": {"field": "above"},
            "color": {"field": "norm", "type": "quantitative", "scale": colour, "legend": None},
            "tooltip": [{"field": key, "title": key} for key in ("step", "layer", "norm")],
        },
    }
    return spec_of([cells], min(340, max(120, 9 * layers)))


def heat_ends(spec: Spec | None) -> tuple[float, float]:
    """Return the bounds of the lightest and of the darkest colour of `grad_norm_by_layer`, for its legend."""
    edges = spec["layer"][0]["encoding"]["color"]["scale"]["domain"] if spec else [0.0]
    return edges[0], edges[-1]


def _edges(values: Sequence[float]) -> list[float]:
    """Return the bounds of the colours of a heat map: equal ratios from the 2nd to the 98th percentile."""
    ordered = sorted(value for value in values if value > 0) or [1.0]
    low, high = ordered[len(ordered) * 2 // 100], ordered[(len(ordered) - 1) * 98 // 100]
    if high < low * 1.01:
        low, high = low / 2, high * 2
    ratio = math.log(high / low) / (len(HEAT) - 2)
    return [rounded(low * math.exp(n * ratio)) for n in range(len(HEAT) - 1)]


def held_out_metrics(run: RunFiles) -> Spec | None:
    """Draw the shares that evaluations measure beside the loss: exact match, accuracy, macro F1, recall."""
    names = dict.fromkeys(
        key
        for one in run.held_out
        for key, value in one.items()
        if key not in NO_SHARES and "/" not in key and is_number(value) and 0 <= value <= 1 and isinstance(value, float)
    )
    values = [
        {"step": one["step"], "value": rounded(one[key]), "metric": key.replace("_", " ")}
        for key in list(names)[:4]
        for one in run.held_out
        if is_number(one.get(key))
    ]
    if len(run.held_out) < 2 or not values:
        return None
    colours = {"domain": [key.replace("_", " ") for key in list(names)[:4]], "range": [ACCENT, SOFT, PALE, INK]}
    mark = {"type": "line", "strokeWidth": 2, "point": {"filled": True, "size": 40}}
    encoding: Spec = {"x": STEP, "y": _y("") | {"axis": {"format": ".0%"}, "scale": {"domain": [0, 1]}}}
    encoding["color"] = {
        "field": "metric",
        "type": "nominal",
        "scale": colours,
        "legend": {} if len(names) > 1 else None,
    }
    encoding["tooltip"] = [{"field": "step"}, {"field": "metric"}, {"field": "value", "format": ".1%"}]
    return spec_of([{"data": {"values": values}, "mark": mark, "encoding": encoding}], 150)
