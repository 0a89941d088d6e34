"""Asks an OpenAI-compatible server for JSON: again where it is busy, with the user's key, and at one address.

The key is read from OPENAI_API_KEY. It is sent over https or to this machine alone, kept nowhere, and cut out of what a
server says. A server that was started here is asked once and without a key, since it is there or has ended.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
from email.utils import parsedate_to_datetime
from typing import Any

from veneer.config import UserError
from veneer.config.address import KEY, server_root
from veneer.config.files import reason
from veneer.release.certify.transport import Reply, is_loopback, send

DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
FIRST_SECONDS = 30.0  # of the list of models
TIMEOUTS = 2  # tries without an answer in time: each of them is long
LONGEST_WAIT = 120.0  # seconds that a server may ask to wait
BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 520, 529)
SHOWN = 300  # characters of a server's message


class NoAnswerError(Exception):
    """A server gives no answer that is JSON, and no further try would change that.

    Args:
        why: behaviour of the server, such as a status.
        fix: Advice; empty: there is none.
        status: HTTP status of its reply; 0: there is none.
    """

    def __init__(self, why: str, fix: str = "", status: int = 0) -> None:
        super().__init__(why)
        self.fix, self.status = fix, status


class _TryAgain(NoAnswerError):  # noqa: N818 - the next try may do
    """The server is busy or its answer was lost.

    Args:
        why, status: arguments of NoAnswerError.
        wait: Seconds that it asks to wait.
        is_late: Whether it did not answer in time.
    """

    def __init__(self, why: str, status: int = 0, wait: float = 0.0, is_late: bool = False) -> None:
        super().__init__(why, status=status)
        self.wait, self.is_late = wait, is_late


class Client:
    """A server and the key that it is asked with.

    Args:
        url: Address, with or without /v1.
        option: Option that names it; empty: an argument.
        is_own: Whether the server was started here.

    Raises:
        UserError: It is no address, or the key holds what no key does.
    """

    def __init__(self, url: str, option: str = "", is_own: bool = False) -> None:
        self.url, self.root = url, server_root(url, option)
        self._is_own = is_own
        self._key = "" if is_own or not _is_private(url) else _key()

    def find_model(self, name: str | None, option: str = "--model", seconds: float = FIRST_SECONDS) -> str:
        """Return the name of the model to ask.

        Args:
            name: Name that the user gave; None: the server's only model.
            option: Option that gives it.
            seconds: Time for the whole answer.

        Raises:
            UserError: Nothing answers there as an OpenAI-compatible server does, the key is wrong, it has no such
                model, or several and none of them is named.
        """
        try:
            names = [str(entry["id"]) for entry in self.ask("/v1/models", None, seconds)["data"]]
            why, fix = "it lists no models", ""
        except NoAnswerError as error:
            names, why, fix = [], str(error), error.fix
        except (KeyError, TypeError):
            names, why, fix = [], "its answer is of another form", ""
        if not names:
            raise UserError(
                f"{self.url}: no OpenAI-compatible server answers there (GET /v1/models: {why})",
                fix or "start it first, or name the address of one that runs",
            )
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        if name is None and len(names) > 1:
            raise UserError(f"{self.url}: serves {len(names)} models: {shown}", f"name one with {option}")
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: {self.url} does not serve it", f"name one of: {shown}")
        return name or names[0]

    def ask(self, path: str, body: dict[str, Any] | None, seconds: float, is_once: bool = False) -> Any:
        """Send a request and return the parsed answer; ask again where the server is busy or its answer is lost.

        Args:
            path: Path behind the address; a redirect to another one is not followed.
            body: Content of a POST; None: a GET.
            seconds: Time for the whole answer.
            is_once: Whether to ask once.

        Raises:
            NoAnswerError: There is no JSON with status 200.
            JobError: It is larger than `send` takes.
        """
        delays = () if is_once or self._is_own else DELAYS
        late = 0
        for number, delay in enumerate((*delays, 0.0), 1):
            try:
                return self._once(path, body, seconds)
            except _TryAgain as error:
                last, delay, late = error, max(delay, error.wait), late + error.is_late
            if number > len(delays) or delay > LONGEST_WAIT or late == TIMEOUTS:
                break
            time.sleep(delay)
        tries = f", after {number} tries" if number > 1 else ""
        waits = f"; it asks to wait {delay:g} seconds" if delay > LONGEST_WAIT else ""
        raise NoAnswerError(f"{last}{tries}{waits}", "try later" if delays else "", last.status)

    def _once(self, path: str, body: dict[str, Any] | None, seconds: float) -> Any:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            reply = send(self.root + path, body, headers, seconds)
        except TimeoutError:
            raise _TryAgain(f"no answer within {seconds:g} seconds", is_late=True) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = _lost(error)
            if body is None:  # the first request of all: nobody is there
                raise NoAnswerError(why) from None
            raise _TryAgain(why) from None
        if reply.status in BUSY:
            raise _TryAgain(f"status {reply.status}: {self._said(reply)}", reply.status, _wait(reply))
        if reply.status != 200:
            raise self._refusal(reply)
        try:
            return json.loads(reply.content)
        except (ValueError, RecursionError):
            begins = reply.content[:60].decode(errors="replace")
            what = f"it is no whole JSON, and begins with {begins!r}" if begins else "it is empty"
            raise NoAnswerError(what, status=reply.status) from None

    def _refusal(self, reply: Reply) -> NoAnswerError:
        """Return what a status means that no further try would change."""
        if 300 <= reply.status < 400:
            elsewhere = str(reply.headers.get("location", "elsewhere"))[:SHOWN]
            why = f"it redirects to {elsewhere}, which is not followed"
            return NoAnswerError(why, "name that address, if you mean it", reply.status)
        said = f"status {reply.status}: {self._said(reply)}"
        if reply.status in (401, 403):
            why = f"it {'refuses the key' if self._key else 'wants a key'} ({said})"
            fix = f"set the environment variable {KEY}; it is sent over https or to this machine alone"
            return NoAnswerError(why, fix, reply.status)
        return NoAnswerError(said, status=reply.status)

    def _said(self, reply: Reply) -> str:
        """Return the message of a reply, without the key that it may repeat."""
        try:
            found = json.loads(reply.content)
        except (ValueError, RecursionError):
            found = None
        error = found.get("error", found) if isinstance(found, dict) else reply.content.decode(errors="replace")
        text = error.get("message", error) if isinstance(error, dict) else error
        said = " ".join((text if isinstance(text, str) else json.dumps(text)).split())
        return (said.replace(self._key, "[key]") if self._key else said)[:SHOWN] or "nothing"


def _is_private(url: str) -> bool:
    """Whether nobody on the way to an address can read what is sent."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.netloc)


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not all("!" <= sign <= "~" for sign in key):
        raise UserError(f"{KEY}: holds characters that no key has", "set it anew")
    return key


def _lost(error: Exception) -> str:
    """Return why there is no reply."""
    if isinstance(error, http.client.HTTPException):
        return f"it is cut short, or no HTTP ({type(error).__name__})"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return reason(cause) if isinstance(cause, BaseException) else str(cause)


def _wait(reply: Reply) -> float:
    """Return the seconds that a busy server asks to wait; 0: it does not say."""
    value = reply.headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
