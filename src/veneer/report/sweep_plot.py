"""The picture of a sweep: trained parameters against held-out loss, with intervals, and the combination to take."""

from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

from veneer.config.folder import write_bytes
from veneer.report.plots import ACCENT, INK, SOFT

LABELLED = 16  # combinations at most that are labelled by their settings; of more, the best and the sweet spot alone


def plot_sweep(results: dict[str, Any], path: Path, title: str) -> None:
    """Draw `sweep.png` from results.json; combinations that were stopped are hollow, those that failed are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [one for one in results["combinations"] if one["loss"] is not None]
    shown.sort(key=lambda one: one["trainable"])
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    spot, best = (next(one for one in shown if one["number"] == results[key]) for key in ("sweet_spot", "best"))
    what = f"95% over {results['seeds']} seeds" if results["seeds"] > 1 else f"95% over {results['rows']} held-out rows"
    for status, color, label in (("finished", INK, f"trained to the end, {what}"), ("stopped", SOFT, "stopped early")):
        chosen = [one for one in shown if one["status"] == status]
        if chosen:
            losses = [one["loss"] for one in chosen]
            axes.errorbar(
                [one["trainable"] for one in chosen],
                [loss["value"] for loss in losses],
                yerr=[
                    [loss["value"] - loss["low"] for loss in losses],
                    [loss["high"] - loss["value"] for loss in losses],
                ],
                fmt="o",
                color=color,
                markerfacecolor=color if status == "finished" else "white",
                capsize=3,
                label=label,
            )
    axes.plot(
        spot["trainable"],
        spot["loss"]["value"],
        "o",
        markersize=14,
        markerfacecolor="none",
        color=ACCENT,
        markeredgewidth=2,
        linestyle="none",
        label="sweet spot: smallest that is not shown to be worse",
    )
    for one in shown if len(shown) <= LABELLED else (spot, best):
        is_left = one["trainable"] ** 2 < shown[0]["trainable"] * shown[-1]["trainable"]
        axes.annotate(
            _label(one["settings"]),
            (one["trainable"], one["loss"]["value"]),
            (9, 5) if is_left else (-9, -11),  # those in the middle would meet on one line
            textcoords="offset points",
            horizontalalignment="left" if is_left else "right",
            fontsize=7,
            color=INK,
        )
    # What was stopped may be far off; the others decide what is in sight.
    ends = [one["loss"][end] for one in shown if one["status"] == "finished" for end in ("low", "high")]
    room = max(ends) - min(ends) or 1.0
    axes.set_ylim(min(ends) - 0.2 * room, max(ends) + room)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("held-out loss (nats a trained token)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(path, picture.getvalue())


def _label(settings: dict[str, Any]) -> str:
    """Return a combination's settings in lines of moderate length."""
    values = {name: "+".join(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()}
    return fill(", ".join(f"{name.partition('.')[2]}={value}" for name, value in values.items()), 36)
