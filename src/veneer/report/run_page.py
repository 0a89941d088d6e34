"""The page of a run: scores, loss, data, answers, files and what to do next. One file, from the run's folder alone."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from veneer.config import RunFolder, load_run
from veneer.config.files import read_json, read_json_lines, read_text, reading
from veneer.config.folder import write_text
from veneer.config.results import metric_name
from veneer.report.interval_plot import interval_plots
from veneer.report.page import environment
from veneer.report.pair_curves import are_pairs, held_out_text, pair_curves
from veneer.report.plots import smooth

WIDTH, HEIGHT = 720, 200  # of the loss curve, in pixels
LEFT, BOTTOM = 44, 26  # room for its axes
SHOWN_BY = "the first two messages that the tuned model has right, and the first that it has wrong"
MODELS = {
    "base": "base",
    "base_with_examples": "base with examples",
    "tuned": "tuned",
    "exported": "exported",
    "difference": "tuned less base",
    "difference_with_examples": "tuned less base with examples",
}


def write_run_page(folder: RunFolder) -> Path:
    """Write report.html into a run's folder, and give its path."""
    path = folder.path / "report.html"
    with reading(f"{folder.path}: its files do not make a page"):
        page = run_page(folder.path)
    write_text(path, page)
    return path


def run_page(folder: Path) -> str:
    """Render the page of a run as HTML; parts whose files are not there are left out.

    Args:
        folder: The run's folder.
    """
    run = RunFolder(folder)
    page = environment()
    page.filters["size"] = _size
    source = resources.files("veneer.report").joinpath("run_page.html.jinja").read_text(encoding="utf-8")
    evaluation = _json(run.evaluation)
    suites = evaluation.get("suites", {}).get("scores", {})
    samples = read_json_lines(run.samples, "tuned_right") if evaluation else []
    records = read_json_lines(run.metrics, "step", "kind", is_appended=True) if run.metrics.exists() else []
    return page.from_string(source).render(
        name=folder.name,
        run=load_run(run.run),
        settings=read_text(run.run),
        plan=_json(run.plan),
        ledger=_json(run.ledger),
        environment=_json(run.environment),
        evaluation=evaluation,
        scores=_scores(evaluation.get("metrics", {})),
        first=_first(evaluation),
        win_rates=[
            one | {"cell": _cell("share", one["win_rate"], False)} for one in evaluation.get("win_rates", {}).values()
        ],
        plots=interval_plots(evaluation.get("metrics", {}), evaluation.get("comparison", {})),
        suite_plots=interval_plots(suites, suites),
        suites=_scores(suites),
        tasks=_scores(
            {name: one for name, one in evaluation.get("tasks", {}).get("metrics", {}).items() if one["group"] is None}
        ),
        curve=_curve(records),
        pair_curves=pair_curves(records) if are_pairs(records) else [],
        held_out_pairs=held_out_text(records),
        warnings=_warnings(run.events),
        training=_json(run.delivered / "passport.json").get("training", {}),
        samples=shown_of(samples),
        rule=SHOWN_BY,
        files=_files(folder),
        folder=str(folder),
        models=MODELS,
    )


def shown_of(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose lines of samples.jsonl to show, by the rule SHOWN_BY."""
    right = [sample for sample in samples if sample["tuned_right"]]
    wrong = [sample for sample in samples if not sample["tuned_right"]]
    return right[:2] + wrong[:1]


def _first(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return what the page says first: the models' values by the metric that decides; empty: there is none."""
    if not evaluation.get("metrics"):
        return {}
    name, values = next(iter(evaluation["metrics"].items()))
    is_share = values.get("unit") == "share"
    found: dict[str, Any] = {
        model: f"{100 * values[model]['value']:.0f} %" if is_share else f"{values[model]['value']:.3g}"
        for model in ("base", "base_with_examples", "tuned")
        if model in values
    }
    gain = values.get("difference_with_examples", values["difference"])
    better = values.get("better", "higher")
    what = "exactly right" if name in ("record", "exact_match") else f"by {name.replace('_', ' ')}"
    return found | {"what": what, "is_better": gain["low"] > 0 if better == "higher" else better and gain["high"] < 0}


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the table of scores: its columns, and by metric the cells."""
    columns = [key for key in MODELS if any(key in values for values in metrics.values())]
    rows = {
        metric_name(name): [
            _cell(values.get("unit", ""), values.get(key), key.startswith("difference")) for key in columns
        ]
        for name, values in metrics.items()
    }
    return {"columns": [MODELS[key] for key in columns], "rows": rows}


def _cell(unit: str, value: dict[str, float] | None, is_difference: bool) -> tuple[str, str]:
    """Format a value and its interval."""
    if value is None:
        return "", ""
    sign = "+" if is_difference else ""
    if unit != "share":
        return f"{value['value']:{sign}.3g}", f"{value['low']:{sign}.3g} to {value['high']:{sign}.3g}"
    percent = "" if is_difference else " %"
    shown, low, high = (f"{100 * value[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{shown}{percent}", f"{low} to {high}"


def _warnings(events: Path) -> list[str]:
    """Return what a run warned of, each once, in its order."""
    told = read_json_lines(events, "level", "message", is_appended=True) if events.exists() else []
    return list(dict.fromkeys(event["message"] for event in told if event["level"] == "warning"))


def _curve(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the loss curve: points of each step, of the running mean and of held-out losses, and marks on the axes."""
    records = [record for record in records if record.get("loss") is not None]
    trained = [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
    held_out = [(record["step"], record["loss"]) for record in records if record["kind"] == "eval"]
    if not trained:
        return None
    last = max(step for step, _ in trained)
    most = max(loss for _, loss in trained + held_out) or 1.0

    def place(step: float, loss: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - 8) * step / last
        return round(across, 1), round(8 + (HEIGHT - BOTTOM - 8) * (1 - loss / most), 1)

    def line(points: list[tuple[int, float]]) -> str:
        return " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))

    mean = list(zip((step for step, _ in trained), smooth([loss for _, loss in trained]), strict=True))
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "floor": HEIGHT - BOTTOM,
        "steps": line(trained),
        "mean": line(mean),
        "held_out": [(*place(*point), f"{point[1]:.3f}") for point in held_out],
        "losses": [(place(0, most * part)[1], f"{most * part:.2g}") for part in (0, 0.5, 1)],
        "last": last,
        "first_loss": trained[0][1],
        "last_loss": mean[-1][1],
    }


def _files(folder: Path) -> list[tuple[str, int]]:
    """Return the run's files and folders with their sizes, checkpoints left out."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in ("checkpoints", "report.html"):
            continue
        inside = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        found.append((path.name + ("/" if path.is_dir() else ""), sum(file.stat().st_size for file in inside)))
    return found


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _json(path: Path) -> dict[str, Any]:
    """Read the object in a file; empty: there is no such file."""
    return read_json(path) if path.exists() else {}
