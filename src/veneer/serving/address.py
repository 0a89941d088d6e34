"""Which addresses a server may listen on: this machine's own, and others where a key protects them."""

import ipaddress

from veneer.config import UserError

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]", "::1")


def require_safe(host: str, key: str | None) -> tuple[str, ...] | None:
    """Return the names of this machine that requests may be for; None: any, since a key protects it.

    Raises:
        UserError: Others can reach the address, and there is no key.
    """
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and key is None:
        raise UserError(
            f"--host {host}: other machines can reach it, and no key is set",
            "give one with --api-key-file FILE or in VENEER_API_KEY, or leave --host out",
        )
    return (*LOCAL_NAMES, host) if is_local else None
