"""The page of a data set: ledger, length histogram, rows with their tokens. One file without external resources."""

from importlib import resources
from typing import Any

from veneer.report.page import environment

WIDTH, HEIGHT = 720, 180  # of the histogram, in pixels


def data_page(title: str, base: str, inspected: dict[str, Any]) -> str:
    """Render the page as HTML.

    Args:
        title: The data's name.
        base: The model whose tokens these are.
        inspected: Result of `veneer data --json`.
    """
    page = environment()
    source = resources.files("veneer.report").joinpath("data_page.html.jinja").read_text(encoding="utf-8")
    histogram = inspected["lengths"]["histogram"]
    return page.from_string(source).render(
        title=title, base=base, bars=_bars(histogram), width=WIDTH, height=HEIGHT, **inspected
    )


def _bars(histogram: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Return the histogram's bars with their positions in the picture."""
    most = max((bar["rows"] for bar in histogram), default=1) or 1
    step = WIDTH / max(1, len(histogram))
    bars = []
    for n, bar in enumerate(histogram):
        height = max(1.0, HEIGHT * bar["rows"] / most) if bar["rows"] else 0.0
        bars.append(bar | {"x": round(n * step, 1), "wide": round(step - 2, 1), "high": round(height, 1)})
    return bars
