"""The certificate of an artifact."""

from collections.abc import Callable
from pathlib import Path

from veneer.api.held_out import held_out_rows
from veneer.api.live_page import renew_page
from veneer.config import UserError
from veneer.config.notify import notify_on_error
from veneer.config.task import require_answers
from veneer.data.pipeline import HeldOut
from veneer.model.tuned import TunedModel, find_tuned
from veneer.release.certify.artifact import find_artifact
from veneer.release.certify.certificate import Certificate, certify_artifact, write_certificate
from veneer.release.certify.judged import recorded_answers
from veneer.release.certify.prompts import Prompt, prompts_of, very_long
from veneer.release.publish.card import renew_card
from veneer.report.certificate_page import certificate_page


def certify(
    artifact: str,
    run: str,
    rows: int | None = None,
    base: str | None = None,
    force: bool = False,
    on_status: Callable[[str], None] = lambda what: None,
    model: str | None = None,
) -> tuple[Certificate, Path]:
    """Put what ships beside the adapter it came from, and write certificate.json and its page.

    Example:
        certificate, folder = veneer.certify("shipped/merged", "runs/tickets")

    Args:
        artifact: A merged folder, a GGUF file, or the address of a server.
        run: Folder of the run, or of the adapter.
        rows: Largest number of held-out rows; None: as many as the run evaluates (`evaluate.rows`).
        base: Another base than the adapter names.
        force: Continue although the adapter does not belong to the base.
        on_status: Callback that gets a line of status.
        model: Name of the model, on a server that has several.

    Returns:
        The certificate, and the folder it was written into: the artifact's, or the run's for a server.

    Raises:
        UserError: There is no such artifact or run, or the artifact does not load.
    """
    tuned = find_tuned(run, base, force)
    require_answers(tuned.model, "veneer certify")
    found = find_artifact(artifact, tuned, model)
    own = None if tuned.is_checkpoint else tuned.folder  # a checkpoint's proof is none of its run's adapter
    prompts, longest, skipped = questions_of(tuned, rows)
    certificate = certify_artifact(found, tuned, prompts, longest, skipped, recorded_answers(tuned), on_status)
    page = certificate_page(certificate.as_dict())
    targets = [] if found.path is None else [found.path if found.path.is_dir() else found.path.parent]
    targets += [] if own is None else [own.path]
    for target in targets or [Path()]:
        write_certificate(certificate, target, page)
    if own is not None:
        notify_on_error("the card", lambda: renew_card(own, tuned.trained_from or tuned.model))
        renew_page(own)
    return certificate, (targets or [Path()])[0]


def questions_of(tuned: TunedModel, rows: int | None) -> tuple[list[Prompt], int, dict[str, str]]:
    """Return the prompts of a certificate, the longest answer, and the checks that cannot be made, with the reason."""
    renderer = tuned.renderer
    held_out: list[HeldOut] = []
    skipped = {}
    if tuned.run is None or tuned.folder is None:
        skipped["answers and score on held-out rows"] = "the adapter has no run beside it"
    elif rows == 0:
        skipped["answers and score on held-out rows"] = "none were asked for (--rows 0)"
    else:
        try:
            held_out = held_out_rows(tuned.folder, tuned.run, renderer, None, rows or tuned.run.evaluate.rows)
        except UserError as error:
            skipped["answers and score on held-out rows"] = str(error).splitlines()[0]
    longest = tuned.run.evaluate.max_new_tokens if tuned.run is not None else 64
    return prompts_of(renderer, held_out, very_long(tuned, longest)), longest, skipped
