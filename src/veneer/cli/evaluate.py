"""veneer evaluate: base against tuned on held-out rows."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: Annotated[str | None, typer.Option(help="File of rows to use instead of the held-out ones.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Maximum number of rows.")] = None,
    base: Annotated[str | None, typer.Option(help="Another base than the one the run names.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Use the adapter even on a base it was not trained on.")
    ] = False,
    gate: Annotated[
        str | None, typer.Option(help='Condition that must be shown to hold: "exact_match >= 0.8 and ...".')
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show rows that got better and worse.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> int:
    """Measure exact match of generated answers and perplexity, base against tuned.

    Exit status 1 where a gate is not shown to hold.

    Example: `veneer evaluate runs/tickets --gate "exact_match >= 0.8"`
    """
    from veneer.cli import checks, show, show_comparison

    checks.require_gate(gate)
    checks.require_evaluation(str(run), data, base)
    out = show.console(as_json)
    with show.status(out, "answering the held-out rows with the base and the tuned model") as status:
        import veneer

        answered = 0

        def on_done(count: int) -> None:
            nonlocal answered
            answered += count
            status.update(f"{answered} answers")

        evaluated = veneer.evaluate(run, data, rows, on_done, force, base, gate)
    result, status_code = evaluated.as_dict(), 0 if evaluated.passed else 1
    if as_json:
        show.print_json(result)
        show_comparison.show_gate(out, result["gate"])
        return status_code
    show_comparison.show_detectable(out, result["comparison"], result["metrics"])
    show.show_scores(out, f"{result['rows']} held-out rows, 95% intervals", result["metrics"], ("base", "tuned"))
    show_comparison.show_verdicts(out, result["comparison"], result["metrics"])
    if verbose:
        show_comparison.show_turned(out, evaluated.evaluation)
    show_comparison.show_gate(out, result["gate"])
    out.print(f"files  {evaluated.file} {evaluated.samples.name}", markup=False)
    if not evaluated.is_record:
        out.print(
            "       the run's own record (evaluation.json and its card) is about its held-out rows and is not changed"
        )
    return status_code
