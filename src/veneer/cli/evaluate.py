"""veneer evaluate: base against tuned on held-out rows."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: Annotated[str | None, typer.Option(help="File of rows to use instead of the held-out ones.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Maximum number of rows.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Metrics instead of evaluate.metrics, as exact_match,rouge_l.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Another base than the one the run names.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Use the adapter even on a base it was not trained on.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> None:
    """Measure generated answers and losses by the run's metrics, base against tuned.

    Example: `veneer evaluate runs/tickets --rows 50 --metrics accuracy,perplexity`
    """
    from veneer.cli import checks, show

    checks.require_evaluation(str(run), data, base)
    out = show.console(as_json)
    with show.status(out, "answering the held-out rows with the base and the tuned model") as status:
        import veneer
        from veneer.cli.progress import Answering

        names = None if metrics is None else [name.strip() for name in metrics.split(",")]
        told = Answering(status)
        evaluated = veneer.evaluate(run, data, rows, told.add, force, base, names, on_begin=told.begin)
    result = evaluated.as_dict()
    if as_json:
        show.print_json(result)
        return
    show.show_scores(out, f"{result['rows']} held-out rows, 95% intervals", result["metrics"], ("base", "tuned"))
    show.say(out, f"metrics  {', '.join(result['chosen']['metrics'])}: {escape(result['chosen']['why'])}")
    out.print(f"files  {evaluated.file} {evaluated.samples.name}", markup=False)
    if not evaluated.is_record:
        out.print(
            "       the run's own record (evaluation.json and its card) is about its held-out rows and is not changed"
        )
