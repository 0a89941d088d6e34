"""Finds out once, within three seconds, whether the hub can be asked, before any library tries and tries again.

The question goes through the library's own client, so that HF_ENDPOINT, HF_HUB_OFFLINE, proxies and certificates mean
what they mean for a download. Where the hub cannot be asked, files of its local cache are used, and what is not there
is refused in one message.
"""

import threading
import time
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError

SECONDS = 3.0
REMEMBERED = 60  # seconds; a network may come back
NOT_SERVED = (407, 502, 503, 504)  # a proxy's refusal, or a hub that is down


def unreachable() -> str | None:
    """Why the hub cannot be asked; None: it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return _probe(constants.ENDPOINT, int(time.monotonic() // REMEMBERED))


def require_reachable(what: str) -> None:
    """Raises UserError where something is to be had from the hub alone, and the hub cannot be asked."""
    if (why := unreachable()) is not None:
        raise not_here(what, why)


def not_here(what: str, why: str) -> UserError:
    """The error of something that is not on this machine, with a hub that cannot be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return UserError(
            f"{what}: not on this machine, and the hub is not asked: {why}",
            "name a local folder or file, or unset HF_HUB_OFFLINE",
        )
    return UserError(
        f"{what}: not on this machine, and the hub ({constants.ENDPOINT}) cannot be reached: {why}",
        "name a local folder or file; or check the network (HTTPS_PROXY, HF_ENDPOINT); HF_HUB_OFFLINE=1 never asks",
    )


def adapter_folder(name: str) -> Path | None:
    """The folder of a hub's adapter in the user's cache, fetched where the hub can be asked; None: it is no adapter.

    Args:
        name: hub id of the form owner/name.

    Raises:
        UserError: The hub holds the adapter, and does not give it.
    """
    from huggingface_hub import file_exists, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        held = try_to_load_from_cache(name, "adapter_config.json")
        is_adapter = isinstance(held, str) if unreachable() is not None else file_exists(name, "adapter_config.json")
    except (HfHubHTTPError, HFValidationError, OSError):
        return None  # a gated base, say, or no id at all: whoever asked says what is wrong with it
    if not is_adapter or unreachable() is not None:
        return Path(str(held)).parent if is_adapter else None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: the hub does not give it: {reason}", "check your access (hf auth login)") from None


@cache
def _probe(endpoint: str, period: int) -> str | None:
    """Why an endpoint does not answer, asked anew in each period; None: it answers, whatever it says."""
    answer: Future[int] = Future()
    # Not a pool: looking up a name cannot be interrupted, and a thread of a pool would hold up the end of the process.
    threading.Thread(target=_ask, args=(endpoint, answer), daemon=True).start()
    try:
        error = answer.exception(SECONDS)
    except TimeoutError:
        return f"no answer within {SECONDS:.0f} s"
    if error is not None:
        return _reason(error)
    return f"it answers {answer.result()}" if answer.result() in NOT_SERVED else None


def _ask(endpoint: str, answer: "Future[int]") -> None:
    try:
        from huggingface_hub import get_session

        session: Any = get_session()
        answer.set_result(session.head(endpoint, timeout=SECONDS).status_code)
    except Exception as error:  # noqa: BLE001 - the library's client may be any, and so its errors
        answer.set_exception(error)


def _reason(error: BaseException) -> str:
    """The failure in a line: the cause is the system's, where the client only wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer within {SECONDS:.0f} s"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
