"""veneer train: carry out a run."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    run: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides: section.key=value.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if the plan says it cannot fit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> None:
    """Fine-tune a model as a YAML file says.

    Example: `veneer train recipes/smollm2-demo.yaml train.learning_rate=1e-4`
    """
    from veneer.cli import show, show_plan
    from veneer.config import load_run

    settings = load_run(run, overrides or ())
    out = show.console(as_json)
    from veneer import api
    from veneer.train import TrainingJob

    job = TrainingJob(settings, resume, force)
    out.print(f"machine  {job.machine.describe()}")
    trainable, total = job.parameters["trainable"], job.parameters["total"]
    out.print(f"model    {settings.model.base}: {total:,} parameters, {trainable:,} trained")
    show.show_engine(out, job.choice)
    show.show_ledger(out, job.data.ledger.as_dict())
    foreseen = job.foreseen.as_dict()
    show_plan.show_verdict(out, foreseen)
    if foreseen["step_seconds"]:
        show_plan.show_time(out, foreseen)
    show_plan.show_advice(out, [found for found in foreseen["advice"] if found["severity"] != "info"])
    result = api.finish(job, [show.LiveProgress(out)])
    if as_json:
        show.print_json(result.as_dict())
        return
    out.print(
        f"[bold]done[/bold]     {result.steps} steps, final loss {result.final_loss:.4f}, "
        f"{result.tokens_per_second:,.0f} tok/s, peak {show.size(result.peak_bytes)}"
    )
    out.print(f"files    {result.run_dir}: adapter/ loss.png metrics.jsonl ledger.json")
    out.print(f"next     {show.command_name()} evaluate {result.run_dir}")
