"""Draws docs/images/memory.png: where the tensors of a step are, and what moves: `python -m tools.memory_figure`.

It shows the placement that needs least memory: all weights streamed, all block inputs on the host.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "memory.png"
BLOCKS, AT = 6, 3  # blocks of the model that is drawn, and the one that is computed
COLORS = {"weights": "#6d9dc5", "input": "#f5a34d"}
OFFSETS = {"weights": 0.0, "input": 0.56}  # of a tensor within its block's column
WIDTH, HEIGHT = 0.5, 0.9  # of a tensor
GPU, HOST = 3.1, 0.0  # lower edges of the two memories
DEPTH = 2.0  # height of a memory


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained")
    draw(axes[0], "forward", 1)
    draw(axes[1], "backward", -1)
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    names = ["4-bit weights of a block", "a block's input"]
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(PICTURE, dpi=110)


def draw(axis: Any, title: str, step: int) -> None:
    """Draw one pass; `step`: 1 where the next block is the one after, -1 where it is the one before."""
    for bottom, name, rest in (
        (GPU, "GPU", "adapters\ngradients\noptimizer\nworkspace"),
        (HOST, "host", "embedding\nhead"),
    ):
        axis.add_patch(Rectangle((0, bottom), 9.6, DEPTH, facecolor="#f4f4f4", edgecolor="#999999"))
        axis.text(0.15, bottom + DEPTH - 0.12, name, va="top", fontsize=11, weight="bold")
        axis.text(8.75, bottom + 0.35 + HEIGHT / 2, rest, ha="center", va="center", fontsize=9)
    for number in range(1, BLOCKS + 1):
        axis.text(left_of(number, "weights") + 0.53, HOST - 0.15, f"block {number}", ha="center", va="top", fontsize=9)
        tensor(axis, number, "weights", HOST)
        tensor(axis, number, "input", HOST, is_there=number < AT)
    for kind in COLORS:
        tensor(axis, AT, kind, GPU, is_used=True)
    moving = {"weights": AT + step, "input": AT - 1}
    for kind, number in moving.items():
        tensor(axis, number, kind, GPU)
        is_down = kind == "input" and step == 1
        arrow(axis, number, kind, is_down)
    axis.set(xlim=(-0.1, 9.7), ylim=(-0.5, GPU + DEPTH + 0.1))
    axis.set_title(f"{title}, while block {AT} is computed", fontsize=12)
    axis.axis("off")


def tensor(axis: Any, number: int, kind: str, memory: float, is_there: bool = True, is_used: bool = False) -> None:
    """Draw a tensor of a block in a memory: empty where it is not there, framed where it is used now."""
    face, edge = COLORS[kind] if is_there else "#ffffff", "#222222" if is_used else "#aaaaaa"
    at = left_of(number, kind), memory + 0.35
    axis.add_patch(Rectangle(at, WIDTH, HEIGHT, facecolor=face, edgecolor=edge, linewidth=2.5 if is_used else 0.8))


def arrow(axis: Any, number: int, kind: str, is_down: bool) -> None:
    """Draw the copy of a tensor between the two memories."""
    at = left_of(number, kind) + WIDTH / 2
    ends = [(at, HOST + 0.35 + HEIGHT + 0.05), (at, GPU + 0.3)]
    start, end = reversed(ends) if is_down else ends
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=20, linewidth=2.5, color=COLORS[kind]))


def left_of(number: int, kind: str) -> float:
    """Return the left edge of a block's tensor."""
    return 0.25 + 1.3 * (number - 1) + OFFSETS[kind]


if __name__ == "__main__":
    main()
