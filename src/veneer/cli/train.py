"""veneer train: train a run."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.config import RunFolder
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
            help="Resume from the run's last checkpoint; with its name (`--resume step-000200`) from that one. "
            "`--resume auto` also starts a run that has not begun: one command for whatever starts jobs again.",
        ),
    ] = False,
    resume_auto: Annotated[bool, typer.Option("--resume-auto", hidden=True)] = False,
    resume_from: Annotated[str | None, typer.Option("--resume-from", hidden=True)] = None,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Go on, finished or not, with more `train.max_steps` or `num_train_epochs`."),
    ] = False,
    fork: Annotated[
        Path | None,
        typer.Option(help="Begin with the state of another run, or of a checkpoint of one (RUN/checkpoints/step-N)."),
    ] = None,
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
    from veneer.cli import checks, show
    from veneer.config import RunFolder

    settings = settings_of(run, overrides or [], model, data, output_dir, fork)
    folder = RunFolder(settings.train.output_dir.expanduser())
    mode: Resume = resume_from or ("auto" if resume_auto else resume)
    if os.environ.get("RANK", "0") == "0":  # of a run on several GPUs, the first process may have begun the folder
        checks.require_output(folder, mode, overwrite, extend, fork is not None)
    out = show.console(as_json)
    if (mode in (True, "auto") or extend) and folder.is_finished:
        from veneer.training.finished import finished

        if (result := finished(settings, extend)) is not None:
            _show_result(out, result, as_json, "finished already")
            if extend and not as_json:
                out.print("extend   it has no more steps than before: raise train.max_steps or train.num_train_epochs")
            return 0
    if gpus is not None and gpus > 1:
        raise SystemExit(_launch(gpus))  # whatever it is, the processes have said why
    with resume_told(folder):
        _train(settings, mode, force, overwrite, extend, fork, out, as_json)
    return 0


def _train(
    settings: Any,
    mode: "Resume",
    force: bool,
    overwrite: bool,
    extend: bool,
    fork: Path | None,
    out: Any,
    as_json: bool,
) -> None:
    """Load a run, show what it is, train it, and show its result."""
    from rich.markup import escape

    from veneer.cli import checks, show, show_plan
    from veneer.cli.show_placement import show_placement

    checks.require_inputs(settings)
    with show.status(out, "loading"):
        from veneer.api.train import finish, load_job
        from veneer.machine.ranks import leave_ranks

        job = load_job(settings, mode, force, overwrite, extend, fork)
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


def _launch(gpus: int) -> int:
    """Run this command in as many processes as GPUs; returns its exit status."""
    from veneer.cli import checks
    from veneer.machine.launch import launch

    checks.require_gpus(gpus)
    given = sys.argv[1:]
    at = next(n for n, word in enumerate(given) if word == "--gpus" or word.startswith("--gpus="))
    return launch(gpus, given[:at] + given[at + (2 if given[at] == "--gpus" else 1) :])


@contextmanager
def resume_told(folder: "RunFolder") -> Iterator[None]:
    """Say how a run that was stopped within the block goes on, whatever it did then.

    Raises:
        Interrupted: It was stopped.
    """
    from veneer.cli import show
    from veneer.config import Interrupted

    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        # An address that does not depend on the working folder, nor on how the run was called.
        saved = sorted(folder.checkpoints.glob("step-*")) if folder.run.exists() else []
        words = ["train", str(folder.path), "--resume"] if saved else sys.argv[1:]
        if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
            words += ["--gpus", ranks]
        command = f"{show.command_name()} {shlex.join(words)}"
        raise Interrupted(saved[-1] if saved else None, command) from None


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
    run: str | None,
    overrides: list[str],
    model: str | None,
    data: str | None,
    output_dir: Path | None,
    fork: Path | None = None,
) -> Any:
    """Return the run of a YAML file, or the smallest one of a base and data; the options are overrides of either.

    A run's folder stands for its run.yaml, wherever the folder is now; and so does that of the run that is forked.

    Raises:
        UserError: Neither says what to train, or a setting is wrong.
    """
    from veneer.config import UserError, load_run, run_of

    options = {"model.base": model, "data.train": data, "train.output_dir": output_dir}
    if run is not None and "=" in run and not Path(run).is_file():  # an override; there is no file
        overrides, run = [run, *overrides], None
    given = [*overrides, *(f"{setting}={value}" for setting, value in options.items() if value is not None)]
    if run is not None:
        folder = _run_folder(Path(run).expanduser())
        if folder is None:
            return load_run(run, given)
        return load_run(folder.run, [f"train.output_dir={folder.path}", *given])
    if fork is not None and model is None and data is None:
        source = _run_folder(fork.expanduser()) or _run_folder(fork.expanduser().parent.parent)
        if source is not None:
            return load_run(source.run, given)
    missing = [option for option, value in (("--model", model), ("--data", data)) if value is None]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"there is nothing to train: no YAML file is named, and {' and '.join(missing)} {verb} missing",
            "name a run's YAML file (`veneer init DATA` writes one), or a base with --model and rows with --data",
        )
    name = Path(data or "").name.split(".")[0] or "run"
    return run_of({"train": {"output_dir": f"runs/{name}"}}, given)


def _run_folder(path: Path) -> "RunFolder | None":
    """Return the run's folder that a path names, itself or by its run.yaml; None: it names another file."""
    from veneer.config import RunFolder

    with suppress(OSError):  # a name that is too long is told by whoever reads the file
        folder = RunFolder(path if path.is_dir() else path.parent)
        if folder.run.is_file() and (path.is_dir() or path.name == folder.run.name) and folder.has_environment():
            return folder
    return None
