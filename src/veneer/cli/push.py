"""veneer push: upload an adapter or a model to a hub, or say what would be sent."""

from typing import Annotated, Any

import typer


def push(
    name: Annotated[str, typer.Argument(help="Folder of a finished run, an adapter or a merged model.")],
    repo: Annotated[str, typer.Option(help="The repository: owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; otherwise it is private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be sent.")] = False,
    with_samples: Annotated[
        bool,
        typer.Option("--with-samples", help="Send the texts of rows: samples, and those in ledger and certificate."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> int:
    """Upload an adapter, or a merged model, to a hub. Where none is reached, it says what it would send.

    Paths are cut to names, and rows of the data stay here unless --with-samples is given.

    Example: `veneer push runs/tickets --repo me/tickets`
    """
    from veneer.cli import checks

    checks.require_folder(name)
    from rich.markup import escape

    import veneer
    from veneer.cli import show, show_release

    out = show.console(as_json)

    def show_parcel(parcel: Any) -> None:
        verb = "would send" if dry_run else "sending"
        out.print(f"{verb} to {escape(repo)} ({'public' if public else 'private'}):")
        for file, size in parcel.files.items():
            out.print(f"  {size:>14,}  {escape(file)}")
        out.print(f"  {parcel.bytes:>14,}  bytes in all")
        show_release.show_warnings(out, parcel.warnings)

    pushed = veneer.push(name, repo, public, dry_run, with_samples, show_parcel)
    if pushed["sent"]:
        out.print(f"sent: {escape(pushed['address'])}")
    elif not dry_run:
        out.print(f"[red]not sent[/red]: {escape(pushed['reason'])}")
        out.print("  fix: check the network and your access (hf auth login); the files above are what would be sent")
    if as_json:
        show.print_json(pushed)
    return 0 if dry_run or pushed["sent"] else 1
