"""Asks a judge model at an OpenAI-compatible server, again where it is busy, with the user's key and at one address.

The key is read from OPENAI_API_KEY when it is needed. It is sent over https or to this machine alone, kept nowhere, and
cut out of what a server says. Endpoint (release/certify/servers.py) asks a model that is to be measured, once and with
nothing in its way; a judge is a service that may be far away, limit its requests and cost money.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

from veneer.config import JobError, UserError
from veneer.config.files import reason
from veneer.evaluation.win_rate.judging import NotAnswered
from veneer.release.certify.transport import Reply, is_loopback, send

KEY = "OPENAI_API_KEY"
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
FIRST_SECONDS = 30.0  # of the list of models
TIMEOUTS = 2  # tries without an answer in time: each of them is long
LONGEST_WAIT = 120.0  # seconds that a server may ask to wait
BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 520, 529)
REFUSED = (400, 413, 422)  # one question, such as one that is too long
SHOWN = 300  # characters of a server's message
FIX = "\n  fix: "
AGAIN = "what was judged is kept, and the same command goes on"


class TryAgain(Exception):  # noqa: N818 - the next try may do
    """The server is busy or its answer was lost.

    Args:
        why: Message.
        wait: Seconds that it asks to wait.
        is_late: Whether it did not answer in time.
    """

    def __init__(self, why: str, wait: float = 0.0, is_late: bool = False) -> None:
        super().__init__(why)
        self.wait, self.is_late = wait, is_late


class JudgeClient:
    """A judge model.

    Args:
        url: Address of the server, with or without /v1.
        model: Name of the model; None: the server's only one.
        max_new_tokens: Longest reply.
        seconds: Longest time of a reply.

    Raises:
        UserError: Nothing answers there as an OpenAI-compatible server does, the key is wrong, or no such model.
    """

    def __init__(self, url: str, model: str | None, max_new_tokens: int, seconds: float) -> None:
        self._root, self._seconds, self._max_new_tokens = _root(url), seconds, max_new_tokens
        self._key = _key() if _is_private(url) else ""
        try:
            listed = self._request("/v1/models", None)
            names = [str(entry["id"]) for entry in listed["data"]]
        except (JobError, NotAnswered, KeyError, TypeError) as error:
            why, _, fix = str(error).partition(FIX) if isinstance(error, JobError) else ("it lists no models", "", "")
            raise UserError(
                f"{url}: no OpenAI-compatible server answers there (GET /v1/models): {why}",
                fix or "start it, or name the address of one that runs",
            ) from None
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        if model is None and len(names) != 1:
            raise UserError(f"{url}: serves {len(names)} models: {shown}", "name the judge with --model")
        if model is not None and model not in names:
            raise UserError(f"--model {model}: {url} does not serve it", f"name one of: {shown}")
        self.model = model or names[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What decides its replies, for the record."""
        return {
            "endpoint": self._root,
            "model": self.model,
            "temperature": 0,
            "max_new_tokens": self._max_new_tokens,
        }

    def ask(self, prompt: str) -> str:
        """Return the reply to a prompt.

        Raises:
            NotAnswered: The server refuses this prompt. JobError: It does not answer, or not as such servers do.
        """
        made = self._request(
            "/v1/chat/completions",
            {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": self._max_new_tokens,
                "temperature": 0,
            },
        )
        try:
            text = made["choices"][0]["message"]["content"]
            return str(text or "")
        except (KeyError, TypeError, IndexError):
            message = json.dumps(made)[:SHOWN]
            raise JobError(f"{self._root}: its answer is not that of an OpenAI-compatible server: {message}") from None

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Send a request, and again where the server is busy or its answer is lost on the way."""
        late = 0
        for number, delay in enumerate((*DELAYS, 0.0), 1):
            try:
                return self._once(path, body)
            except TryAgain as error:
                why, delay, late = str(error), max(delay, error.wait), late + error.is_late
            if number > len(DELAYS) or delay > LONGEST_WAIT or late == TIMEOUTS:
                break
            time.sleep(delay)
        waits = f"; it asks to wait {delay:g} seconds" if delay > LONGEST_WAIT else ""
        raise JobError(f"{self._root}{path}: {why}, after {number} tries{waits}{FIX}try later; {AGAIN}")

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        seconds = min(self._seconds, FIRST_SECONDS) if body is None else self._seconds
        try:
            reply = send(self._root + path, body, headers, seconds)
        except TimeoutError:
            raise TryAgain(f"no answer within {seconds:g} seconds", is_late=True) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            why = reason(cause) if isinstance(cause, Exception) else str(cause)
            if body is None:  # the first request of all: nobody is there
                raise JobError(why) from None
            raise TryAgain(why) from None
        if reply.status in BUSY:
            raise TryAgain(f"status {reply.status}: {self._said(reply)}", _wait(reply))
        if reply.status != 200:
            self._refuse(path, reply)
        found = _json(reply)
        if not isinstance(found, dict):
            raise JobError(f"{self._root}{path}: answers what is no JSON object: {self._said(reply)}")
        return found

    def _refuse(self, path: str, reply: Reply) -> NoReturn:
        """Raise what a status means that no further try would change."""
        if reply.status in REFUSED:
            raise NotAnswered(f"status {reply.status}: {self._said(reply)}")
        if 300 <= reply.status < 400:
            elsewhere = reply.headers.get("location", "elsewhere")
            raise JobError(
                f"{self._root}{path}: redirects to {elsewhere[:SHOWN]}, and rows are sent to no other address"
                f"{FIX}name that address, if you mean it"
            )
        if reply.status in (401, 403):
            what = "refuses the key" if self._key else "wants a key"
            raise JobError(
                f"{self._root}{path}: {what} (status {reply.status}): {self._said(reply)}"
                f"{FIX}set the environment variable {KEY}; it is sent over https or to this machine alone"
            )
        raise JobError(f"{self._root}{path}: status {reply.status}: {self._said(reply)}")

    def _said(self, reply: Reply) -> str:
        """Return the message of a reply, without the key that it may repeat."""
        found = _json(reply)
        error = found.get("error", found) if isinstance(found, dict) else reply.content.decode(errors="replace")
        text = error.get("message", error) if isinstance(error, dict) else error
        said = " ".join((text if isinstance(text, str) else json.dumps(text)).split())
        return (said.replace(self._key, "[key]") if self._key else said)[:SHOWN] or "nothing"


def _root(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(f"--endpoint {url}: not an address", "write http://HOST:PORT or https://HOST")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "--endpoint: the address holds a user, a password or a query, which would be kept with the result",
            f"write it without; a key is read from the environment variable {KEY}",
        )
    return re.sub(r"/v1/?$", "", url.rstrip("/"))


def _is_private(url: str) -> bool:
    """Whether nobody on the way to an address can read what is sent."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.netloc)


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not all("!" <= sign <= "~" for sign in key):
        raise UserError(f"{KEY}: holds characters that no key has", "set it anew")
    return key


def _json(reply: Reply) -> Any:
    try:
        return json.loads(reply.content)
    except (ValueError, RecursionError):
        return None


def _wait(reply: Reply) -> float:
    """Return the seconds that a busy server asks to wait; 0: it does not say."""
    value = reply.headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
