"""An adapter or a model uploaded to a hub."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from veneer.config.hub import unreachable
from veneer.release.publish.push import Parcel, pack, send
from veneer.report import certificate_page


@dataclass(frozen=True)
class Pushed:
    """An upload, or what it would send.

    Attributes:
        parcel: the files, with warnings for their owner.
        address: address of the commit; None: nothing was sent.
        reason: why nothing was sent; None: it was.
    """

    parcel: Parcel
    address: str | None
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        sent = {"sent": self.address is not None, "address": self.address, "reason": self.reason}
        return self.parcel.as_dict() | sent


def push(
    name: str,
    repo: str,
    public: bool = False,
    dry_run: bool = False,
    with_samples: bool = False,
    before: Callable[[Parcel], None] = lambda parcel: None,
) -> Pushed:
    """Upload a run's adapter, or a merged model, to a hub; where no hub is reached, say what would be sent.

    Example:
        pushed = veneer.push("runs/tickets", "me/tickets", dry_run=True)
        print(list(pushed.parcel.files), pushed.reason)

    Args:
        name: folder of a finished run, an adapter or a merged model.
        repo: repository, as owner/name.
        public: whether everyone may see it.
        dry_run: whether to send nothing.
        with_samples: whether to send rows word for word: samples, and those in ledger and certificate.
        before: function that is called with the parcel before anything is sent.

    Raises:
        UserError: There is nothing to send, or the repository's name is not one.
    """
    parcel = pack(name, repo, not public, with_samples, certificate_page)
    before(parcel)
    if dry_run:
        return Pushed(parcel, None, "it was not asked for")
    if (why := unreachable()) is not None:
        return Pushed(parcel, None, f"the hub cannot be reached: {why}")
    try:
        return Pushed(parcel, send(parcel), None)
    except OSError as error:
        return Pushed(parcel, None, str(error).strip().splitlines()[0])
