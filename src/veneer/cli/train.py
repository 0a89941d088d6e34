"""veneer train: train a run."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.training.job import Resume


def train(
    run: Annotated[str | None, typer.Argument(help="YAML file of the run; or none, with --model and --data.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides: section.key=value.")] = None,
    model: Annotated[str | None, typer.Option("--model", "--base", help="Base model: model.base.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data: data.train.")] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", "-o", help="The run's folder.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume from the run's last checkpoint. `--resume auto` also starts a run that has not begun, and is "
            "content with a finished one: one command for whatever starts jobs again.",
        ),
    ] = False,
    resume_auto: Annotated[bool, typer.Option("--resume-auto", hidden=True)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if the plan says it cannot fit.")] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Train on so many GPUs of this machine (or CPU processes), by torchrun.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> int:
    """Fine-tune a model as a YAML file says, or with --model and --data alone.

    Example: `veneer train recipes/smollm2-demo.yaml train.learning_rate=1e-4`
    """
    from rich.markup import escape

    from veneer.cli import checks, show, show_plan
    from veneer.cli.show_placement import show_placement
    from veneer.config import RunFolder

    settings = settings_of(run, overrides or [], model, data, output_dir)
    if gpus is not None and gpus > 1:
        return _launch(gpus)
    folder = RunFolder(settings.train.output_dir.expanduser())
    mode: Resume = "auto" if resume_auto else resume
    checks.require_output(folder, mode, overwrite)
    out = show.console(as_json)
    if mode == "auto" and folder.delivered.exists():
        from veneer.training.finished import finished

        if (result := finished(settings)) is not None:
            _show_result(out, result, as_json, "finished already")
            return 0
    checks.require_inputs(settings)
    with show.status(out, "loading"):
        from veneer.api.train import finish, load_job
        from veneer.machine.ranks import leave_ranks

        job = load_job(settings, mode, force, overwrite)
    out.print(f"machine  {escape(job.machine.describe())}")
    trainable, total = job.parameters["trainable"], job.parameters["total"]
    out.print(f"model    {escape(settings.model.base)}: {total:,} parameters, {trainable:,} trained")
    show.show_engine(out, job.choice)
    show.show_ledger(out, job.data.ledger.as_dict())
    prediction = job.prediction.as_dict()
    show_plan.show_verdict(out, prediction)
    likely = prediction["step_seconds"] and prediction["step_seconds"]["likely"]
    if likely:
        show_plan.show_time(out, prediction)
    show_placement(out, job.placement.as_dict())
    show_plan.show_advice(out, [found for found in prediction["advice"] if found["severity"] != "info"])
    with show.LiveProgress(out, job.steps, job.done, likely) as progress:
        result = finish(job, [progress])
    _show_result(out, result, as_json, "done")
    leave_ranks()
    return 0


def _launch(gpus: int) -> int:
    """Run this command in as many processes as GPUs; returns its exit status."""
    import torch

    from veneer.config import UserError
    from veneer.machine.launch import launch

    if (there := torch.cuda.device_count()) and gpus > there:
        raise UserError(f"--gpus {gpus}: this machine has {there}", f"use --gpus {there}, or less")
    given = sys.argv[1:]
    at = next(n for n, word in enumerate(given) if word == "--gpus" or word.startswith("--gpus="))
    return launch(gpus, given[:at] + given[at + (2 if given[at] == "--gpus" else 1) :])


def _show_result(out: Any, result: Any, as_json: bool, what: str) -> None:
    """Print a run's result and the commands to go on with."""
    from veneer.cli import show
    from veneer.config import RunFolder
    from veneer.config.files import read_json

    if as_json:
        show.print_json(result.as_dict())
        return
    loss = "not known" if result.final_loss is None else f"{result.final_loss:.4f}"
    out.print(
        f"[bold]{what:8}[/bold] {result.steps} steps, final loss {loss}, "
        f"{result.tokens_per_second:,.0f} tok/s, peak {show.size(result.peak_bytes)}"
    )
    if result.best_step is not None:
        which = "last" if result.kept_step == result.steps else "best"
        out.print(
            f"kept     that of the {which} step, {result.kept_step}; the best value was {result.best_value:.4g} after "
            f"step {result.best_step}"
        )
    delivered = RunFolder(Path(result.run_dir)).delivered.name
    out.print(f"files    {result.run_dir}: {delivered}/ loss.png metrics.jsonl ledger.json", markup=False)
    ledger = read_json(RunFolder(Path(result.run_dir)).ledger, "rows")
    follows = "evaluate" if ledger["rows"]["validation"] else "generate"
    out.print(f"next     {show.command_name()} {follows} {shlex.quote(str(result.run_dir))}", markup=False)


def settings_of(
    run: str | None, overrides: list[str], model: str | None, data: str | None, output_dir: Path | None
) -> Any:
    """Return the run of a YAML file, or the smallest one of a base and data; the options are overrides of either.

    Raises:
        UserError: Neither says what to train, or a setting is wrong.
    """
    from veneer.config import UserError, load_run, run_of

    options = {"model.base": model, "data.train": data, "train.output_dir": output_dir}
    given = [*overrides, *(f"{setting}={value}" for setting, value in options.items() if value is not None)]
    if run is not None and not ("=" in run and not Path(run).is_file()):
        return load_run(run, given)
    if run is not None:
        given.insert(0, run)  # an override; there is no file
    missing = [option for option, value in (("--model", model), ("--data", data)) if value is None]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"there is nothing to train: no YAML file is named, and {' and '.join(missing)} {verb} missing",
            "name a run's YAML file (`veneer init DATA` writes one), or a base with --model and rows with --data",
        )
    name = Path(data or "").name.split(".")[0] or "run"
    return run_of({"train": {"output_dir": f"runs/{name}"}}, given)
