"""veneer certify: proof that an artifact behaves like the model that its run was judged by."""

from typing import Annotated

import typer

from veneer.cli.merge import BaseOption, ForceOption, JsonOption, RowsOption


def certify(
    artifact: Annotated[str, typer.Argument(help="Merged folder, GGUF file, or address of a server (http://...).")],
    against: Annotated[str, typer.Option(help="Folder of the run, or of the adapter.")],
    model: Annotated[str | None, typer.Option(help="Name of the model, if the server has several.")] = None,
    rows: RowsOption = None,
    base: BaseOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Put what ships beside the model that the run was judged by: tokens, settings, weights, score row by row, answers.

    Exit status 1 if it differs or is shown to be worse; the first check that fails is named.

    Example: `veneer certify models/tickets --against runs/tickets`
    """
    from veneer.cli import checks

    checks.require_tuned(against, base)
    checks.require_artifact(artifact)
    from veneer.cli import show, show_release

    out = show.console(as_json)
    certificate, status = show_release.certified(out, artifact, against, base, force, rows, model)
    if as_json:
        show.print_json(certificate)
    return status
