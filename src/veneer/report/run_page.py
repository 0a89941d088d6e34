"""The page of a run: how it stands and went, scores, data, answers, settings. One file, from the run's folder alone.

What a run does not have is left out. While a process trains the run, the page loads itself again (report.js); the
numbers in it are those of the files at the time it was written.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from veneer.config import RunFolder
from veneer.config.files import reading
from veneer.config.folder import write_text
from veneer.config.results import limit_text, metric_name, value_text
from veneer.report import charts, result_charts
from veneer.report.headline import facts_of, progress_of
from veneer.report.page import chart_parts, environment
from veneer.report.run_files import RunFiles, read_run
from veneer.report.scores import (
    MODELS,
    SHOWN_BY,
    cell,
    first_of,
    held_out_pairs,
    shown_of,
    table_of,
    verdict_text,
    with_unit,
)
from veneer.report.series import is_number, median
from veneer.report.timeline import events_of

REFRESH_SECONDS = 10  # between two loadings of a page whose run is trained
SHOWN_EVENTS = 40  # of the timeline; the rest is folded


class Figures:
    """The charts of a page, by the `id` of the element that each is drawn in."""

    def __init__(self) -> None:
        self.charts: dict[str, Any] = {}

    def add(self, name: str, spec: charts.Spec | None) -> str:
        """Take a chart; returns its id, empty where there is nothing to draw."""
        if spec is not None:
            self.charts[name] = spec
        return name if spec is not None else ""


def write_run_page(folder: RunFolder, refresh: float = REFRESH_SECONDS) -> Path:
    """Write report.html into a run's folder, and give its path.

    Args:
        folder: the run.
        refresh: seconds after which the page is loaded again, while the run is trained.

    Raises:
        UserError: It holds no run, or its files do not make a page.
    """
    write_text(folder.report, run_page(folder.path, refresh))
    return folder.report


def run_page(folder: Path, refresh: float = REFRESH_SECONDS) -> str:
    """Render the page of a run as HTML; parts whose files are not there are left out.

    Raises:
        UserError: See `write_run_page`.
    """
    run = read_run(folder)
    with reading(f"{folder}: its files do not make a page"):
        return _render(run, refresh)


def _render(run: RunFiles, refresh: float) -> str:
    figures, now = Figures(), datetime.now(UTC)
    is_live = run.state.state == "training"
    reload = {"seconds": refresh, "quiet": _quiet(run, refresh), "written": now.isoformat()} if is_live else None
    context = {
        "run": run,
        "model": run.section("model"),
        "adapter": run.section("adapter"),
        "quantization": run.section("quantization"),
        "train": run.section("train"),
        "folder": str(run.path),
        "written": f"{now:%Y-%m-%d %H:%M:%S}",
        "is_live": is_live,
        "facts": facts_of(run),
        "progress": progress_of(run),
        "files": _files(run.path),
        **_course(run, figures),
        **_found(run.evaluation, figures),
        "progress_samples": _samples_over_time(run),
        "samples": shown_of([one for one in run.samples if "tuned_right" in one]),
        "rule": SHOWN_BY,
        "models": MODELS,
    }
    page: str = _template().render(context, **chart_parts(figures.charts, charts.CONFIG, reload))
    return page


@cache
def _template() -> Any:
    """The page's template, compiled once: that takes ten times as long as a page."""
    page = environment()
    page.filters |= {"size": _size, "value_text": value_text, "limit_text": limit_text, "metric_name": metric_name}
    return page.get_template("run_page.html.jinja")


def _quiet(run: RunFiles, refresh: float) -> float:
    """Return the seconds after which a page that was not written again says so: several records should have come."""
    times = [one["seconds"] for one in run.trained[-20:] if is_number(one.get("seconds"))]
    between = median(times) * (run.section("train").get("logging_steps") or 1)
    return max(120.0, 12 * refresh, 5 * between)


def _course(run: RunFiles, figures: Figures) -> dict[str, Any]:
    """Return what the page shows of the training."""
    events = events_of(run)
    return {
        "loss": figures.add("loss", charts.loss(run)),
        "is_pairs": any("rewards/accuracies" in one for one in run.records),
        "held_out_pairs": held_out_pairs(run.held_out),
        "pairs": [
            (title, what, figures.add(f"pairs-{n}", spec))
            for n, (title, what, spec) in enumerate(charts.pair_charts(run))
        ],
        "training": _training_charts(run, figures),
        "heat_ends": charts.heat_ends(figures.charts.get("layers")),
        "memory": figures.add("memory", result_charts.memory(run)),
        "timeline": figures.add("timeline", result_charts.timeline(events, run.state.step)),
        "events": [event for event in events if event.kind not in ("evaluation", "checkpoint")],
        "shown_events": SHOWN_EVENTS,
        "lengths": figures.add("lengths", result_charts.lengths(run.ledger)),
    }


def _found(evaluation: dict[str, Any], figures: Figures) -> dict[str, Any]:
    """Return what the page shows of evaluation.json."""
    metrics = evaluation.get("metrics") or {}
    suites = (evaluation.get("suites") or {}).get("scores", {})
    tasks = (evaluation.get("tasks") or {}).get("metrics", {})
    matrix = result_charts.confusion(evaluation.get("confusions") or [], evaluation.get("labels") or [])
    return {
        "first": first_of(evaluation),
        "scores": table_of(metrics),
        "plots": _comparisons(figures, "score", metrics, evaluation.get("comparison") or {}),
        "suites": table_of(suites),
        "suite_plots": _comparisons(figures, "suite", suites, suites),
        "tasks": table_of({name: one for name, one in tasks.items() if one["group"] is None}),
        "win_rates": [
            one | {"cell": cell("share", one["win_rate"], False)}
            for one in (evaluation.get("win_rates") or {}).values()
            if "win_rate" in one
        ],
        "confusion": figures.add("confusion", matrix),
        "by_label": evaluation.get("by_label") or evaluation.get("by_type") or {},
    }


def _training_charts(run: RunFiles, figures: Figures) -> list[dict[str, str]]:
    """Return id, title and explanation of the charts of the training, in the order of the page."""
    wanted: tuple[tuple[str, str, str, Callable[[RunFiles], charts.Spec | None]], ...] = (
        ("held-out", "Held-out metrics", "", charts.held_out_metrics),
        ("rate", "Learning rate", "", charts.learning_rate),
        ("norm", "Gradient norm", "before clipping", charts.grad_norm),
        ("share", "Trained tokens", "share of a step's tokens that count in the loss", charts.trained_share),
        ("speed", "Speed", "tokens/s, and the plan's where it is known", charts.speed),
        ("layers", "Gradient norm by layer", "layer 0 is the first", charts.grad_norm_by_layer),
    )
    found = ({"id": figures.add(name, draw(run)), "title": title, "what": what} for name, title, what, draw in wanted)
    return [one for one in found if one["id"]]


def _comparisons(
    figures: Figures, name: str, metrics: dict[str, Any], verdicts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return id, title and verdict of the chart of each metric that has intervals."""
    found = []
    for number, (key, values) in enumerate(metrics.items()):
        united = with_unit(key, values)
        chart = figures.add(f"{name}-{number}", result_charts.comparison(united))
        verdict = (verdicts.get(key) or {}).get("verdict", "")
        if chart:
            told = verdict_text(verdict, united["unit"] == "share")
            kind = {"better": "good", "worse": "bad"}.get(verdict, "soft")
            found.append({"id": chart, "name": metric_name(key), "verdict": told, "kind": kind})
    return found


def _samples_over_time(run: RunFiles) -> list[dict[str, Any]]:
    """Return the rows that evaluations while training answered: prompt, reference, base, and the answers by step."""
    rows: dict[str, dict[str, Any]] = {}
    for one in run.held_out:
        for sample in one.get("samples") or ():
            row = rows.setdefault(sample.get("place", ""), sample | {"answers": []})
            if "base" in sample:
                row["base"] = sample["base"]
            answers = row["answers"]
            if answers and answers[-1]["answer"] == sample.get("answer"):
                answers[-1]["to"] = one["step"]
            else:
                answers.append({"step": one["step"], "to": one["step"], "answer": sample.get("answer", "")})
    return list(rows.values())


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
