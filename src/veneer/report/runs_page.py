"""Several runs side by side on one page: how each stands, their losses on one plane, and the settings that differ."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from veneer.config.files import reading
from veneer.config.results import metric_name
from veneer.report import charts, result_charts
from veneer.report.page import chart_parts, environment
from veneer.report.run_files import RunFiles, read_run
from veneer.report.scores import cell, with_unit
from veneer.report.series import median, points_of, running_mean

MOST_RUNS = 8  # colours that can be told apart
# Settings that differ between any two runs.
_OWN = ("train.output_dir",)


def runs_page(folders: Sequence[Path]) -> str:
    """Render the page of several runs as HTML.

    Raises:
        UserError: One of them is no run, or its files do not make a page.
    """
    runs = list(zip(names_of(folders), [read_run(folder) for folder in folders], strict=True))
    with reading(f"{', '.join(map(str, folders))}: their files do not make a page"):
        found = {kind: result_charts.overlaid(runs, kind) for kind in ("train", "eval")}
        context = {
            "runs": runs,
            "colours": result_charts.RUNS,
            "results": results_of(runs),
            "settings": differing(runs),
            "scores": scores_of(runs),
            "training": "train" if found["train"] else "",
            "held_out": "eval" if found["eval"] else "",
        }
        drawn = {kind: spec for kind, spec in found.items() if spec is not None}
        page: str = _template().render(context, **chart_parts(drawn, charts.CONFIG, None))
        return page


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the folders' paths that tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def results_of(runs: Sequence[tuple[str, RunFiles]]) -> dict[str, list[str]]:
    """Return a line of the table of results for each thing that any run has: a cell a run."""
    lines: dict[str, list[str]] = {
        "state": [run.state.state for _, run in runs],
        "step": [_of(run.state.step, run.state.steps) for _, run in runs],
        "training loss, running mean": [_last(run) for _, run in runs],
        "held-out loss": [_number(run.state.held_out_loss) for _, run in runs],
        "best": [_best(run) for _, run in runs],
        "tokens/s, median": [_speed(run) for _, run in runs],
        "peak memory": [_peak(run) for _, run in runs],
        "trained parameters": [_parameters(run) for _, run in runs],
    }
    return {name: cells for name, cells in lines.items() if any(cells)}


def scores_of(runs: Sequence[tuple[str, RunFiles]]) -> dict[str, list[tuple[str, str]]]:
    """Return the tuned model's value with its interval, by metric of any evaluation.json; a cell a run."""
    metrics = [run.evaluation.get("metrics") or {} for _, run in runs]
    names = dict.fromkeys(name for found in metrics for name in found)
    return {
        metric_name(name): [
            cell(with_unit(name, found[name])["unit"], found[name].get("tuned"), False) if name in found else ("", "")
            for found in metrics
        ]
        for name in names
    }


def differing(runs: Sequence[tuple[str, RunFiles]]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs, as section.key, with each run's value."""
    flat = [_flat(run.settings) for _, run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    found = {name: [settings.get(name, "") for settings in flat] for name in names if name not in _OWN}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _flat(settings: dict[str, Any], before: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{before}{key}.")
        else:
            is_word = value is None or isinstance(value, bool)
            found[f"{before}{key}"] = {None: "null", True: "true", False: "false"}[value] if is_word else str(value)
    return found


def _of(step: int, steps: int | None) -> str:
    return f"{step:,}" if steps in (None, step) else f"{step:,} / {steps:,}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _last(run: RunFiles) -> str:
    points = points_of(run.trained, "loss")
    return _number(running_mean(points)[-1][1]) if points else ""


def _best(run: RunFiles) -> str:
    state = run.state
    return "" if state.best_value is None else f"{state.best_metric} {state.best_value:.4g}, step {state.best_step}"


def _speed(run: RunFiles) -> str:
    speeds = [value for _, value in points_of(run.trained, "tokens_per_second")]
    return f"{median(speeds):,.0f}" if speeds else ""


def _peak(run: RunFiles) -> str:
    peaks = [value for _, value in points_of(run.trained, "peak_bytes")]
    return result_charts.size_text(max(peaks)) if peaks else ""


def _parameters(run: RunFiles) -> str:
    count = (run.plan.get("parameters") or {}).get("trainable")
    return "" if count is None else f"{count:,}"


@cache
def _template() -> Any:
    return environment().get_template("runs_page.html.jinja")
