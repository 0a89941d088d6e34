"""What `veneer plan` and `veneer doctor` print for a person: bars of memory, the verdict, advice, tables of methods."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from veneer.cli.show import say, size
from veneer.cli.show_placement import show_placement

WIDTH = 44  # of the bars
COLOURS = {"fits": "green", "tight": "yellow", "does not fit": "red"}
SEVERITY = {"error": "red", "warning": "yellow", "info": "cyan"}
METHODS = {"full": "full fine-tuning", "lora": "LoRA, 16 bits", "qlora": "QLoRA, 4 bits"}


def show_plan(out: Console, run: Any, plan: dict[str, Any]) -> None:
    """Print a forecast: components, phases, verdict, time, advice."""
    total, trainable = plan["parameters"]["total"], plan["parameters"]["trainable"]
    out.print(f"model    {escape(run.model.base)}: {total:,} parameters, {trainable:,} trained")
    rows = plan["rows"]
    fullest = rows["fullest"]
    known = "as read" if rows["unread"] is None else f"assumed: {escape(rows['unread'])}"
    if plan["pairs"] is not None:
        out.print(f"pairs    {plan['pairs']:,} to train on in {rows['steps']:,} optimizer steps; each is two documents")
    out.print(f"data     fullest micro-batch {fullest['rows']} x {fullest['length']:,} tokens ({known})")
    out.print(f"device   {escape(plan['target']['name'])}")
    out.print(f"engine   {plan['engine']}: {escape(plan['engine_reason'])}")
    out.print(f"\n[bold]memory at the peak[/bold] ({plan['peak_phase']})")
    _bars(out, plan["components"], plan["budget_bytes"])
    out.print("\n[bold]phases[/bold]")
    counts = {name: f", {count} row{'s' * (count > 1)} at a time" for name, count in plan["rows_at_a_time"].items()}
    phases = {name + counts.get(name, ""): peak["bytes"] for name, peak in plan["phases"].items()}
    _bars(out, phases, plan["budget_bytes"], False)
    show_placement(out, plan["placement"])
    out.print()
    show_verdict(out, plan)
    if plan["target"]["device"] == "cuda":
        out.print(f"least    train.memory_budget={plan['least_budget']}, the smallest that training fits")
    host = f"host {size(plan['host_bytes'])}, " if plan["target"]["device"] == "cuda" else ""
    fetch = f", to fetch {plan['download_bytes'] / 1e9:.1f} GB" if plan["download_bytes"] else ""
    out.print(f"besides  {host}disk {size(plan['disk_bytes'])}{fetch}")
    show_time(out, plan)
    if "by_gpus" in plan:
        show_by_gpus(out, plan)
    show_changes(out, plan)
    show_advice(out, plan["advice"])


def show_verdict(out: Console, plan: dict[str, Any]) -> None:
    """Print whether it fits; and whether training does, where only answers take more."""
    colour = COLOURS[plan["verdict"]]
    margin = plan["margin_bytes"]
    left = f"{size(margin)} left" if margin >= 0 else f"{size(-margin)} too much"
    out.print(
        f"verdict  [bold {colour}]{plan['verdict']}[/bold {colour}]: peak {size(plan['peak_bytes'])} of "
        f"{size(plan['budget_bytes'])}, {left}"
    )
    training = max(peak["bytes"] for name, peak in plan["phases"].items() if name != "generation")
    if margin < 0 and training <= plan["budget_bytes"]:
        out.print(f"         training fits, with {size(training)}; `veneer evaluate` does not")


def show_time(out: Console, plan: dict[str, Any]) -> None:
    """Print speed and duration with their ranges, or why there are none."""
    if plan["step_seconds"] is None:
        out.print("time     not known: `veneer doctor --measure` on that machine takes 20 seconds")
        return
    step, whole = plan["step_seconds"], plan["run_seconds"]
    line = f"time     {plan['tokens_per_second']:,.0f} tok/s, a step {duration(step['likely'])}"
    if whole is not None:
        steps = plan["rows"]["steps"]
        line += (
            f", {steps:,} steps in {duration(whole['likely'])} ({duration(whole['low'])} to {duration(whole['high'])})"
        )
    out.print(f"{line}; by {escape(plan['ceilings'])}")


def show_by_gpus(out: Console, plan: dict[str, Any]) -> None:
    """Print the run by the number of GPUs."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("GPUs", "memory a card", "rows a step", "steps", "exchange", "tok/s", "time", "gain"):
        table.add_column(name, justify="right")
    for one in plan["by_gpus"]:
        steps, speed, whole, gain = (one[key] for key in ("steps", "tokens_per_second", "run_seconds", "gain"))
        table.add_row(
            *(str(one["gpus"]), size(one["peak_bytes"]), f"{one['rows_per_step']:,}"),
            "-" if steps is None else f"{steps:,}",
            "" if one["gpus"] == 1 else duration(one["exchange_seconds"]),
            "-" if speed is None else f"{speed:,.0f}",
            "-" if whole is None else duration(whole),
            "-" if gain is None else f"{gain:.2f}",
        )
    out.print()
    out.print(table, soft_wrap=False)
    speed, source = plan["gpu_link"]["bandwidth"] / 1e9, escape(plan["gpu_link"]["source"])
    say(out, f"[dim]exchange: of gradients in a step, at {speed:.0f} GB/s ({source})[/dim]")
    say(out, "[dim]rows a step: to keep those of one GPU, divide train.gradient_accumulation_steps by the GPUs[/dim]")


def show_changes(out: Console, plan: dict[str, Any]) -> None:
    """Print the changes that make it fit."""
    if plan["changes"] is None:
        out.print("to fit   [red]nothing helps[/red]: no known smaller model of its family fits")
    elif plan["changes"]:
        out.print("to fit   the cheapest changes (--fit FILE writes them):")
        for change in plan["changes"]:
            new = ", ".join(f"{name}={value}" for name, value in change["settings"].items() if value is not None)
            out.print(f"         {escape(new)}  [dim]costs {change['cost']}[/dim]")


def show_advice(out: Console, advice: list[dict[str, str]]) -> None:
    """Print findings, a line each with its fix under it."""
    for found in advice:
        colour = SEVERITY[found["severity"]]
        say(out, f"  [{colour}]{found['severity']}[/{colour}] {found['setting']}: {escape(found['message'])}", 5)
        say(out, f"     fix: {escape(found['fix'])} [dim]({found['id']})[/dim]", 10)


def show_comparison(out: Console, compared: dict[str, Any]) -> None:
    """Print methods side by side: their memory, what fits which size of GPU, the longest row, the smallest card."""
    title = f"{compared['base']} at {compared['max_length']:,} tokens, rank {compared['r']}, one row at a time"
    out.print(f"\n[bold]methods[/bold] for {escape(title)}")
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    methods = list(compared["methods"].values())
    for name in ("", *(METHODS[method] for method in compared["methods"])):
        table.add_column(name)
    table.add_row("needs", *(size(found["peak_bytes"]) for found in methods))
    for name in methods[0]["fits"]:
        cells = ("[green]fits[/green]" if found["fits"][name] else "[red]no[/red]" for found in methods)
        table.add_row(name, *cells)
        table.add_row("  largest", *(short(found["largest"][name]) for found in methods))
    table.add_row("longest row", *(f"{found['longest_row']:,}" if found["longest_row"] else "-" for found in methods))
    table.add_row("smallest card", *(found["smallest_card"] or "-" for found in methods))
    out.print(table, soft_wrap=False)
    say(out, "[dim]largest: the largest base of a family that fits[/dim]")
    say(out, "[dim]longest row: in tokens, up to the base's positions, on the device of the plan:[/dim]")
    say(out, f"[dim]  {escape(compared['target'])}[/dim]")


def short(base: str | None) -> str:
    """Return a base's name without its owner."""
    return "nothing" if base is None else base.rpartition("/")[2]


def duration(seconds: float) -> str:
    """Format a duration for a person."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bars(out: Console, parts: dict[str, int], budget: int, stacked: bool = True) -> None:
    """Draw a bar each against the budget; stacked ones begin where the one before ended."""
    whole = max(budget, sum(parts.values()) if stacked else max(parts.values()))
    named = max(len(name) for name in parts)
    at = 0
    for name, count in sorted(parts.items(), key=lambda part: -part[1]) if stacked else parts.items():
        begin = round(WIDTH * at / whole)
        end = max(begin + 1, round(WIDTH * (at + count) / whole))
        over = count + at > budget
        bar = " " * begin + ("▓" if over else "█") * (end - begin)
        limit = min(WIDTH - 1, round(WIDTH * budget / whole))
        line = (bar + " " * WIDTH)[:WIDTH]
        line = line[:limit] + ("│" if line[limit] == " " else line[limit]) + line[limit + 1 :]
        colour = "red" if over else "blue"
        out.print(f"  {name:<{named}}  {size(count):>10}  [{colour}]{line}[/{colour}]")
        at += count if stacked else 0


def show_machine(out: Console, found: dict[str, Any]) -> None:
    """Print a machine: parts, libraries, what works, what it trains, what is broken."""
    machine = found["machine"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    for gpu in found["gpus"]:
        free = f"{size(gpu['free_bytes'])} of {size(gpu['total_bytes'])} free"
        table.add_row("gpu", f"{escape(gpu['name'])}: {free}, compute capability {gpu['capability'] / 10:.1f}")
    if link := found["gpu_link"]:
        peers = "each reaches the others' memory" if link["has_peers"] else "through the host's memory"
        table.add_row("link", f"{link['bandwidth'] / 1e9:,.1f} GB/s, bus bandwidth of an all-reduce; {peers}")
    if found["driver"]:
        table.add_row("driver", f"{found['driver']}, torch built for CUDA {found['torch_cuda'] or 'none'}")
    if machine["device"] == "cpu":
        free = f"{size(machine['free_bytes'])} of {size(machine['total_bytes'])} free"
        table.add_row("cpu", f"{escape(machine['name'])}: {machine['cores']} cores, {free}")
    for folder, free in found["disk_free_bytes"].items():
        table.add_row("disk", f"{size(free)} free in {escape(folder)}")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    table.add_row("python", f"{found['python']}: {versions}")
    for part in dict.fromkeys(part["part"] for part in found["usable"]):
        names = [
            f"[green]{p['name']}[/green]" if p["works"] else f"[dim]{p['name']} ({escape(p['why'])})[/dim]"
            for p in found["usable"]
            if p["part"] == part
        ]
        table.add_row(part, ", ".join(names))
    if ceilings := found["ceilings"]:
        table.add_row(
            "speed",
            f"{ceilings['half_flops'] / 1e12:.3g} TFLOP/s, {ceilings['bandwidth'] / 1e9:,.0f} GB/s "
            f"({ceilings['source']})",
        )
    else:
        table.add_row("speed", "[dim]not measured: veneer doctor --measure[/dim]")
    for name, what in found["builtin"].items():
        table.add_row("built-in", f"{escape(name)}: {escape(what)}")
    out.print(table)
    _show_bases(out, found)
    for problem in found["problems"]:
        out.print(f"\n[red]broken[/red]   {escape(problem['message'])}\n     fix: {escape(problem['fix'])}")
    if not found["problems"]:
        out.print("\n[green]nothing is broken[/green]")


def _needs(model: dict[str, Any], method: str) -> str:
    """Return the memory of a method for the doctor's table; marked where it takes weights that are streamed."""
    if method in model["streamed"]:
        return f"{size(model['streamed_bytes'][method])} streamed"
    return size(model["peak_bytes"][method]) if method in model["peak_bytes"] else "more"


def _show_bases(out: Console, found: dict[str, Any]) -> None:
    table = Table(
        title=f"what {size(found['budget_bytes'])} can train, 2,048 tokens a row, rank 16", title_justify="left"
    )
    for name in ("base", "LoRA, 16 bits", "QLoRA, 4 bits", "best that fits"):
        table.add_column(name, justify="left" if name == "base" else "right")
    for model in found["trains"]:
        needs = [_needs(model, method) for method in ("lora", "qlora")]
        best = METHODS.get(model["best"] or "", "[red]none[/red]")
        table.add_row(f"{short(model['base'])} ({model['parameters'] / 1e9:.2g}B)", *needs, best)
    out.print(table)
