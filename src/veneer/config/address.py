"""Checks the address of a server before anything is imported or sent."""

import re
import urllib.parse

from veneer.config.errors import UserError

KEY = "OPENAI_API_KEY"  # environment variable that holds a user's key


def server_root(url: str, option: str = "") -> str:
    """Return the address of an OpenAI-compatible server without /v1.

    Args:
        url: Address, with or without /v1.
        option: Option that names it; empty: an argument.

    Raises:
        UserError: It is no address, or holds what is secret and would be kept with a result.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(f"{option} {url}: not an address".strip(), "write http://HOST:PORT or https://HOST")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"{option or parts.scheme + '://...'}: the address holds a user, a password or a query, which would be "
            "kept with the result",
            f"write it without; a key is read from the environment variable {KEY}",
        )
    return re.sub(r"/v1/?$", "", url.rstrip("/"))
