"""What is checked before a route: the key, the address that was asked for, the kind and the size of the body.

On this machine alone, pages of other sites must not ask through the user's browser: a request has to name this machine
(against DNS rebinding), and a body has to be JSON (which browsers do not send elsewhere unasked). The key is compared
in constant time and never written anywhere. All of it is plain ASGI, so that a refused body is never held.
"""

import hmac
import json
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from veneer.serving.errors import ApiError
from veneer.serving.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health")  # asked without a key: they tell nothing


class Guard:
    """Checks requests and hands those that pass to an application.

    Args:
        app: The application.
        key: The key; None: none is needed.
        body_bytes: Most bytes of a body.
        hosts: Names of this machine that a request may be for; None: any.
        metrics: Counters of requests.
        paths: Paths that exist, by which requests are counted.
    """

    def __init__(
        self,
        app: App,
        key: str | None,
        body_bytes: int,
        hosts: tuple[str, ...] | None,
        metrics: Metrics,
        paths: frozenset[str],
    ) -> None:
        self._app, self._key, self._most, self._hosts = app, key, body_bytes, hosts
        self._metrics, self._paths = metrics, paths

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"])
        counted = path if path in self._paths else "other"
        has_begun = False

        async def counting(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._metrics.requests[counted, int(message["status"])] += 1
            await send(message)

        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._require(scope, headers, path)
            await self._app(scope, self._limited(receive, headers), counting)
        except ApiError as error:
            if not has_begun:
                await _refuse(error, counting)
        except Exception as error:  # noqa: BLE001 - a defect: the client gets JSON, and standard error the traceback
            traceback.print_exception(error, file=sys.stderr)
            if not has_begun:
                await _refuse(ApiError(500, "the server failed on this request"), counting)

    def _require(self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes], path: str) -> None:
        if self._hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name not in self._hosts:
                raise ApiError(421, f"this server answers for {', '.join(self._hosts[:2])}, not for {name[:100]!r}")
        if self._key is not None and path not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            kind, _, key = given.partition(b" ")
            if not hmac.compare_digest(key.strip(), self._key.encode()) or kind.lower() != b"bearer":
                raise ApiError(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if scope["method"] == "POST":
            kind_of_body = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind_of_body != b"application/json":
                raise ApiError(415, "the body has to be JSON (Content-Type: application/json)")

    def _limited(self, receive: Receive, headers: dict[bytes, bytes]) -> Receive:
        too_large = ApiError(413, f"the body has more than {self._most:,} bytes", code="request_too_large")
        said = headers.get(b"content-length", b"")
        if said.isdigit() and int(said) > self._most:
            raise too_large
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise too_large
            return message

        return limited


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    listed = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": listed})
    await send({"type": "http.response.body", "body": body})
