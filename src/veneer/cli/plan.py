"""veneer plan: memory and time of a run, and advice on it, before anything is loaded."""

from pathlib import Path
from typing import Annotated

import typer


def plan(
    run: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides: section.key=value.")] = None,
    gpu: Annotated[str | None, typer.Option(help='Plan for another GPU: "rtx 4090", or its memory as 24GiB.')] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Compare numbers of GPUs up to this one; without it, those that are here.")
    ] = None,
    fit: Annotated[Path | None, typer.Option(help="Write the run, changed so that it fits, to this file.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Full, LoRA and QLoRA at 16, 24, 48 and 80 GiB.")] = False,
    no_data: Annotated[bool, typer.Option("--no-data", help="Do not read the data; assume full-length rows.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> None:
    """Predict a run's memory and time, say whether it fits, and what to change. Nothing is loaded or fetched.

    Example: `veneer plan run.yaml --gpu "rtx 4090"`
    """
    import gc

    gc.disable()  # a process of three seconds, a quarter of which would go into looking for garbage
    from veneer.cli import checks, show, show_plan
    from veneer.config import JobError, load_run
    from veneer.config.load import RUN_HEADER
    from veneer.config.names import find_model
    from veneer.machine.cards import parse_budget

    settings = load_run(run, overrides or ())
    if fit is not None:
        fit = checks.output_file("--fit", fit, RUN_HEADER)
    find_model(settings.model)
    if gpu is not None:
        parse_budget(gpu)
    out = show.console(as_json)
    with show.status(out, "planning"):
        import veneer

        planned = veneer.plan(settings, gpu, not no_data, gpus)
        gc.freeze()  # at the end of the process, too
        compared = planned.compare() if compare else None
    result = planned.as_dict() | ({"compare": compared} if compared else {})
    if fit is not None and planned.fitted is not None:
        from veneer.config.folder import write_text
        from veneer.config.load import to_yaml

        write_text(fit, to_yaml(planned.fitted.run))
    if as_json:
        show.print_json(result)
    else:
        show_plan.show_plan(out, settings, result)
        if compared:
            show_plan.show_comparison(out, compared)
        if fit is not None and planned.fitted is not None:
            out.print(f"wrote    {fit}", markup=False)
    if fit is not None and planned.fitted is None:
        raise JobError(f"--fit {fit}: nothing makes this run fit; the file was not written")
