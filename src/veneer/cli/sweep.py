"""veneer sweep: which settings of a run to take."""

from pathlib import Path
from typing import Annotated, Any

import typer


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file of the sweep.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep that is in its folder.")] = False,
    gpus: Annotated[
        int, typer.Option(min=1, help="Trials at a time, each on a GPU of its own (or in a CPU process).")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> None:
    """Train combinations of settings on one loaded base, and compare them by held-out loss.

    Exit status 1 if a trial failed; the others go on.

    Example: `veneer sweep recipes/sweep-ranks.yaml`
    """
    from veneer.cli import checks, show
    from veneer.config.sweep import load_sweep

    planned = load_sweep(file)
    checks.require_inputs(planned.run)
    checks.require_gpus(gpus)
    out = show.console(as_json)
    seeds = planned.sweep.seeds
    out.print(f"sweep    {len(planned.combinations)} combinations, {seeds} seed{'s' if seeds > 1 else ''} each")
    with show.status(out, "loading") as status:
        import veneer

        names = {str(one.settings): one.name for one in planned.combinations}

        def on_record(record: dict[str, Any]) -> None:
            found = record["message"] if record["status"] == "failed" else f"held-out loss {record['loss']:.4f}"
            steps = f"step {record['steps']}: " if "steps" in record else ""
            name = names[str(record["settings"])]
            out.print(f"trial    {name}, seed {record['seed']}: {steps}{found}", markup=False)

        swept = veneer.sweep(planned, resume, on_record, lambda: status.update("training the trials"), gpus)
    if as_json:
        show.print_json(swept.as_dict())
    else:
        _show(out, swept)
    if swept.result.failed:
        raise typer.Exit(1)


def _show(out: Any, swept: Any) -> None:
    """Print the table, the combination to take and the commands to go on with."""
    from rich.markup import escape
    from rich.table import Table

    from veneer.cli import show

    result = swept.result
    over = f"{result.seeds} seeds" if result.seeds > 1 else f"{result.rows} held-out rows"
    title = f"held-out loss, and what it is above the best one's, with 95% intervals over {over}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("settings", "trained", "seconds", "loss", "above", ""):
        table.add_column(column, justify="left" if column in ("settings", "") else "right", overflow="fold")
    for one in result.combinations:
        marks = [one.status] if one.status != "finished" else []
        marks += ["best"] if one is result.best else []
        marks += ["sweet spot"] if one is result.sweet_spot else []
        above = one.difference
        table.add_row(
            escape(one.combination.name),
            "" if one.trainable is None else f"{one.trainable:,}",
            "" if one.seconds is None else f"{one.seconds:,.1f}",
            "" if one.loss is None else f"{one.loss.value:.4f}",
            "" if above is None or one is result.best else f"{above.low:.4f} to {above.high:.4f}",
            ", ".join(marks) + (f" at step {one.steps}" if one.status == "stopped" else ""),
        )
    out.print(table)
    for one in result.combinations:
        if one.message:
            out.print(f"failed   {one.combination.name}: {one.message}", markup=False)
    out.print(f"files    {swept.folder}: sweep.png results.json trials.jsonl best.yaml sweet-spot.yaml", markup=False)
    out.print(f"next     {show.command_name()} train {swept.folder / 'sweet-spot.yaml'}", markup=False)
