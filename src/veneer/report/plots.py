"""The loss of a run as a picture: every step, their running mean, and the held-out losses."""

from io import BytesIO
from pathlib import Path
from typing import Any

from veneer.config.folder import write_bytes

INK, SOFT, ACCENT = "#1f3a5f", "#9db4cc", "#c8553d"


def plot_loss(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw `loss.png` from the records of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval" and record["loss"] is not None]
    figure = Figure(figsize=(7, 4), dpi=150)  # a layout of its own would draw everything twice
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.13, top=0.92)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [record["step"] for record in trained]
    losses = [record["loss"] for record in trained]
    axes.plot(steps, losses, color=SOFT, linewidth=1, label="training, each step")
    if len(losses) > 10:
        axes.plot(steps, smooth(losses), color=INK, linewidth=2, label="training, running mean")
    if held_out:
        axes.plot(
            [record["step"] for record in held_out],
            [record["loss"] for record in held_out],
            color=ACCENT,
            marker="o",
            linewidth=1.5,
            label="held-out",
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss of a pair" if "logps/chosen" in trained[0] else "loss (nats a trained token)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(path, picture.getvalue())


def smooth(values: list[float]) -> list[float]:
    """Average over a window around each value, about a fifteenth of the run wide; the curve does not lag."""
    half = max(1, len(values) // 30)
    windows = (values[max(0, n - half) : n + half + 1] for n in range(len(values)))
    return [sum(window) / len(window) for window in windows]
