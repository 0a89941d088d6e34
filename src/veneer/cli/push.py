"""veneer push: upload an adapter or a model to a hub, or say what would be sent."""

from typing import Annotated

import typer


def push(
    name: Annotated[str, typer.Argument(help="Folder of a finished run, an adapter or a merged model.")],
    repo: Annotated[str, typer.Option(help="The repository: owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; otherwise it is private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
    with_samples: Annotated[
        bool,
        typer.Option("--with-samples", help="Send rows word for word: samples, and those in ledger and certificate."),
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

    from veneer.cli import show, show_release
    from veneer.config.hub import unreachable
    from veneer.release.publish.push import pack, send
    from veneer.report import certificate_page

    out = show.console(as_json)
    parcel = pack(name, repo, not public, with_samples, certificate_page)
    out.print(f"{'would send' if dry_run else 'sending'} to {escape(repo)} ({'public' if public else 'private'}):")
    for file, size in parcel.files.items():
        out.print(f"  {size:>14,}  {escape(file)}")
    out.print(f"  {parcel.bytes:>14,}  bytes in all")
    show_release.show_warnings(out, parcel.warnings)
    result = parcel.as_dict() | {"sent": False, "address": None, "reason": "it was not asked for"}
    if not dry_run:
        try:
            if (why := unreachable()) is not None:
                raise OSError(f"the hub cannot be reached: {why}")
            result |= {"sent": True, "address": send(parcel), "reason": None}
            out.print(f"sent: {escape(str(result['address']))}")
        except OSError as error:
            result["reason"] = str(error).strip().splitlines()[0]
            out.print(f"[red]not sent[/red]: {escape(str(result['reason']))}")
            out.print(
                "  fix: check the network and your access (hf auth login); the files above are what would be sent"
            )
    if as_json:
        show.print_json(result)
    return 0 if dry_run or result["sent"] else 1
