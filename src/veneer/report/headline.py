"""The first lines of a run's page: where the run stands, its loss and best step, speed, time and memory."""

from dataclasses import dataclass
from datetime import datetime

from veneer.report.result_charts import size_text
from veneer.report.run_files import RunFiles
from veneer.report.series import is_number, median, points_of, running_mean

RECENT = 20  # logged steps that speed and time left are of


@dataclass(frozen=True)
class Fact:
    """A number of the headline: its name, the number, and what is said of it."""

    name: str
    value: str
    detail: str = ""


def facts_of(run: RunFiles) -> list[Fact]:
    """Return the numbers that are known."""
    found = (_step(run), _loss(run), _held_out(run), _best(run), _speed(run), _time(run), _memory(run))
    return [fact for fact in found if fact is not None]


def progress_of(run: RunFiles) -> float | None:
    """Return the share of the steps that are done; None: it is not known, or all are."""
    if not run.state.steps or run.state.state == "finished":
        return None
    return min(1.0, run.state.step / run.state.steps)


def duration(seconds: float) -> str:
    """Return a time as a person says it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if minutes < 100:
        return f"{minutes} min"
    return f"{hours} h {round(seconds / 60) % 60:02d} min" if hours < 48 else f"{seconds / 86400:.1f} days"


def _step(run: RunFiles) -> Fact | None:
    steps, step = run.state.steps, run.state.step
    if not run.records:
        return None if steps is None else Fact("steps planned", f"{steps:,}")
    epoch = run.trained[-1].get("epoch") if run.trained else None
    return Fact(
        "step",
        f"{step:,}" if steps is None or step == steps else f"{step:,} / {steps:,}",
        f"epoch {epoch:.2f}" if is_number(epoch) else "",
    )


def _loss(run: RunFiles) -> Fact | None:
    points = points_of(run.trained, "loss")
    if not points:
        return None
    mean = running_mean(points)[-1][1]
    return Fact("loss", f"{mean:.4g}", f"from {points[0][1]:.4g}" if len(points) > 1 else "")


def _held_out(run: RunFiles) -> Fact | None:
    known = [one for one in run.held_out if is_number(one.get("loss"))]
    if not known:
        return None
    last = known[-1]
    ends = (last.get("intervals") or {}).get("loss")
    return Fact(
        "held-out loss", f"{last['loss']:.4g}", f"{ends[0]:.3g} to {ends[1]:.3g}" if ends else f"step {last['step']}"
    )


def _best(run: RunFiles) -> Fact | None:
    state = run.state
    if state.best_value is None or len(run.held_out) < 2:
        return None
    metric = "held-out loss" if state.best_metric == "loss" else state.best_metric.replace("_", " ")
    return Fact("best", f"{state.best_value:.4g}", f"{metric}, step {state.best_step}")


def _speed(run: RunFiles) -> Fact | None:
    speeds = [value for _, value in points_of(run.trained, "tokens_per_second")]
    if not speeds:
        return None
    planned = run.plan.get("tokens_per_second")
    usual = median(speeds if run.state.state == "finished" else speeds[-RECENT:])
    detail = f"{usual / planned:.0%} of the plan's" if is_number(planned) and planned else "median of a step"
    return Fact("tokens/s", f"{usual:,.0f}", detail)


def _time(run: RunFiles) -> Fact | None:
    seconds = [value for _, value in points_of(run.trained[-RECENT:], "seconds")]
    if run.state.state == "training" and run.state.steps and seconds:
        left = (run.state.steps - run.state.step) * median(seconds)
        return Fact("time left", duration(left), f"{median(seconds):.3g} s a step")
    times = [one["time"] for one in run.records if isinstance(one.get("time"), str)]
    if len(times) > 1:
        try:
            took = (datetime.fromisoformat(times[-1]) - datetime.fromisoformat(times[0])).total_seconds()
        except (ValueError, TypeError):
            return None
        return Fact("time", duration(took), "from the first to the last record")
    return None


def _memory(run: RunFiles) -> Fact | None:
    peaks = [value for _, value in points_of(run.trained, "peak_bytes")]
    if not peaks:
        return None
    predicted = run.plan.get("peak_bytes")
    return Fact(
        "peak memory", size_text(max(peaks)), f"predicted {size_text(predicted)}" if is_number(predicted) else ""
    )
