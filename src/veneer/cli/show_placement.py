"""What `veneer plan` and `veneer train` print of a placement: where each kind of tensor is, and what that buys."""

from collections import Counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from veneer.cli.progress import size

# Kinds of tensors in the order of a step, by their names in the engine.
KINDS = {
    "x": "block inputs",
    "qkv": "q k v",
    "attention": "attention",
    "mid": "mid",
    "gate_up": "gate and up",
    "4-bit weights": "4-bit weights",
    "embedding and head": "embedding and head",
}
STATES = ("keep", "recompute", "host", "nf4", "dequantized", "streamed", "sharded")
SUMMED = ("bytes", "host_bytes", "seconds")


def show_placement(out: Console, placement: dict[str, Any]) -> None:
    """Print a placement, a line a kind of tensor; nothing where the engine takes blocks whole.

    Args:
        out: console to print on.
        placement: `MemoryPlacement.as_dict()`.
    """
    choices = _choices(placement)
    if {choice["tensor"] for choice in choices} <= {"activations"}:
        return
    more = placement.get("bytes", 0)
    than = f", {size(abs(more))} {'more' if more > 0 else 'less'} than with nothing kept" if more else ""
    out.print(f"\n[bold]placement[/bold]{than}; times of a micro-batch")
    whole = _cells(choices)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), show_footer=any(whole[1:]))
    table.add_column("tensors", "in all", no_wrap=True)
    table.add_column("blocks")
    for name, cell in zip(("GPU", "host", "saves"), whole[1:], strict=True):
        table.add_column(name, cell, justify="right", no_wrap=True)
    for tensor in sorted({choice["tensor"] for choice in choices}, key=_rank):
        table.add_row(escape(KINDS.get(tensor, tensor)), *_cells([c for c in choices if c["tensor"] == tensor]))
    out.print(table, soft_wrap=False)


def _choices(placement: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a placement's choices, and those that its blocks alone say; a block's weights count as one kind."""
    counts = Counter[tuple[str, str]]()
    for alike in placement["blocks"]:
        for tensor, state in alike["activations"].items():
            counts[tensor, state] += alike["count"]
        if states := set(alike["weights"].values()):
            counts["4-bit weights", max(states, key=STATES.index)] += alike["count"]
    found = {key: {"tensor": key[0], "state": key[1], "blocks": count} for key, count in counts.items()}
    return list((found | {(choice["tensor"], choice["state"]): choice for choice in placement["choices"]}).values())


def _cells(choices: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the cells of a line: its states by the number of blocks, bytes here and there, seconds."""
    states = sorted(choices, key=lambda choice: STATES.index(choice["state"]))
    device, host, seconds = (sum(choice.get(name, 0) for choice in choices) for name in SUMMED)
    return (
        ", ".join(f"{choice['state']} {choice['blocks']}" for choice in states),
        *map(_bytes, (device, host)),
        _seconds(seconds),
    )


def _rank(tensor: str) -> tuple[int, str]:
    """Return the place of a kind in the table; kinds that are not known here come last."""
    return list(KINDS).index(tensor) if tensor in KINDS else len(KINDS), tensor


def _bytes(count: int) -> str:
    return size(count) if count else ""


def _seconds(seconds: float) -> str:
    shown = f"{seconds:.2f} s" if abs(seconds) >= 0.995 else f"{1000 * seconds:.0f} ms"
    return shown if abs(seconds) >= 0.0005 else ""
