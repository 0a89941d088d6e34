"""One HTTP request: to the address that was named and to no other, with a bound on its time and on its size."""

import ipaddress
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from email.message import Message
from typing import Any

from veneer.config import JobError

ANSWER_BYTES = 64 * 2**20  # of a whole answer


@dataclass(frozen=True)
class Reply:
    """The reply to a request.

    Attributes:
        status: HTTP status.
        headers: headers, found in any case of their letters.
        content: body.
    """

    status: int
    headers: Message
    content: bytes


def send(url: str, body: dict[str, Any] | None, headers: Mapping[str, str], seconds: float) -> Reply:
    """Send a request, with JSON where there is a body, and return the reply whatever its status; follow no redirect.

    Raises:
        JobError: It answers more than ANSWER_BYTES. OSError, HTTPException, ValueError: There is no reply.
        TimeoutError: There is none within so many seconds.
    """
    reply: Future[Reply] = Future()
    # A socket's timeout begins anew with every byte; the whole answer has one of its own, in a thread that may be left.
    threading.Thread(target=_fetch, args=(url, body, headers, seconds, reply), daemon=True).start()
    return reply.result(seconds)


def _fetch(
    url: str, body: dict[str, Any] | None, headers: Mapping[str, str], seconds: float, answer: "Future[Reply]"
) -> None:
    try:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
        handlers: list[urllib.request.BaseHandler] = [_NotFollowed()]
        if is_loopback(request.host):
            handlers.append(urllib.request.ProxyHandler({}))
        try:
            reply = urllib.request.build_opener(*handlers).open(request, timeout=seconds)
        except urllib.error.HTTPError as error:
            reply = error  # its text says what is wrong
        with reply:
            found = reply.read(ANSWER_BYTES + 1)
        if len(found) > ANSWER_BYTES:
            raise JobError(f"{url}: the server's answer is larger than {ANSWER_BYTES >> 20} MiB")
        answer.set_result(Reply(reply.status or 0, reply.headers, found))
    except Exception as error:  # noqa: BLE001 - it is raised again where the answer is waited for
        answer.set_exception(error)


def is_loopback(host: str) -> bool:
    """Whether a host, with or without its port, is this machine."""
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class _NotFollowed(urllib.request.HTTPRedirectHandler):
    """Returns redirects as answers: rows go to the address that the user named and to no other."""

    def redirect_request(self, *given: Any) -> None:
        return None
