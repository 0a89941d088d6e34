"""What merge, export and certify print for a person."""

from typing import Any

from rich.console import Console
from rich.markup import escape

from veneer.cli import show


def show_merged(out: Console, report: Any) -> None:
    """Print what a merge wrote."""
    out.print(
        f"[bold]written[/bold]  {escape(report.out)}: {report.tensors} tensors ({report.changed} of them changed), "
        f"{report.bytes / 1e9:.2f} GB in {report.files} file{'s' if report.files != 1 else ''}, {report.dtype}"
    )
    if report.difference is not None:
        out.print(f"checked  loaded again, it gives the adapter's scores within {report.difference:.1g}")
    show_choice(out, report.choice)
    show_warnings(out, report.warnings)


def show_warnings(out: Console, warnings: Any) -> None:
    """Print warnings, a line each."""
    for warning in warnings:
        show.say(out, f"  [yellow]warning:[/yellow] {escape(warning)}", 4)


def certified(
    out: Console, artifact: str, run: str, base: str | None, force: bool, rows: int | None, model: str | None = None
) -> tuple[dict[str, Any], int]:
    """Certify an artifact and show the certificate; gives it with the exit status."""
    import veneer

    with show.status(out, "certifying") as status:
        certificate, folder = veneer.certify(artifact, run, rows, base, force, lambda what: status.update(what), model)
    result = certificate.as_dict()
    show_certificate(out, result)
    out.print(f"files    {escape(str(folder))}: certificate.json certificate.html", soft_wrap=True)
    return result, 0 if certificate.passed else 1


def show_certificate(out: Console, certificate: dict[str, Any]) -> None:
    """Print each check beside its limit, and the verdict."""
    title = f"{len(certificate['prompts'])} prompts, {certificate['seconds']} s"
    show.show_checks(out, certificate["checks"], certificate["skipped"], title)
    if certificate["passed"]:
        out.print("[bold green]certified[/bold green]: it behaves like the model that was evaluated")
    else:
        out.print(f"[bold red]differs[/bold red]  first at {escape(certificate['first_difference'])}")
    score = certificate["score"]
    if score and score["verdict"].startswith("not shown"):
        points = f"{100 * score['smallest_visible']:.1f} points"
        out.print(f"[yellow]score[/yellow]    {score['rows']} rows show only differences of {points} or more")


def show_choice(out: Console, choice: dict[str, Any] | None) -> None:
    """Print what `--on best` measured, and which base it took."""
    if choice is not None:
        scores = f"base in 4 bits {choice['judged']:.1%}, in 16 bits {choice['base']:.1%} of {choice['rows']} rows"
        out.print(f"[bold]on[/bold]       {choice['on']}: {scores}; {escape(choice['why'])}")
