"""Uploads an adapter or a model to a hub."""

from collections.abc import Callable
from typing import Any

from veneer.config.hub import unreachable
from veneer.release.publish.push import Parcel, pack, send
from veneer.report.certificate_page import certificate_page


def push(
    name: str,
    repo: str,
    public: bool = False,
    dry_run: bool = False,
    with_samples: bool = False,
    before: Callable[[Parcel], None] = lambda parcel: None,
) -> dict[str, Any]:
    """Upload a run's adapter, or a merged model, to a hub; where no hub is reached, say what would be sent.

    Example:
        pushed = veneer.push("runs/tickets", "me/tickets", dry_run=True)
        print(list(pushed["files"]), pushed["sent"], pushed["reason"])

    Args:
        name: folder of a finished run, an adapter or a merged model.
        repo: repository, as owner/name.
        public: whether everyone may see it.
        dry_run: whether to send nothing.
        with_samples: whether to send rows word for word: samples, and those in ledger and certificate.
        before: function that is called with the parcel before anything is sent.

    Returns:
        What `veneer push --json` prints: the files with their sizes, and the commit's address or why nothing was sent.

    Raises:
        UserError: There is nothing to send, or the repository's name is not one.
    """
    parcel = pack(name, repo, not public, with_samples, certificate_page)
    before(parcel)
    address, reason = None, "it was not asked for"
    try:
        if not dry_run:
            if (why := unreachable()) is not None:
                raise OSError(f"the hub cannot be reached: {why}")
            address = send(parcel)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
    sent = address is not None
    return parcel.as_dict() | {"sent": sent, "address": address, "reason": None if sent else reason}
