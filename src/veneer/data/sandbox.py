"""Renders chat templates in a process of its own, within limits of time and memory.

A template is a program that came with a stranger's model. Jinja's sandbox keeps it from files and from Python, not from
loops without end or texts of many gigabytes, and nothing within one process can stop such a call. So a child process
renders: a timer of the kernel ends it after 2 s of a rendering, and its address space is limited.

What goes between the processes is JSON, and many rows go at once. One child serves all renderers of a process; it ends
with it, since its input ends then. A worker of the tokenizing pool, which may be ended itself, renders under the same
limits without a child. Where the system has no such limits (Windows), rendering is unlimited.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import IO, Any

SECONDS = 2  # CPU time of a rendering
MEMORY = 512 * 2**20  # bytes beyond what the child takes by itself
TEXT = 64 * 2**20  # characters that the rows of a request may be rendered as, beyond what came in
AT_ONCE = 100  # rows of a request
TOO_LONG = f"takes longer than {SECONDS} s to render a conversation"
TOO_LARGE = f"needs more than {MEMORY >> 20} MiB to render a conversation"


class TemplateLimitError(Exception):
    """A template exceeds a limit; the message says which. `row`: of those that were to be rendered."""

    def __init__(self, reason: str, row: int) -> None:
        super().__init__(reason)
        self.row = row


class RefusedError(Exception):
    """A template refuses a conversation; the message is the template's own."""


@dataclass(frozen=True)
class Job:
    """Texts of one conversation.

    Attributes:
        turns: turns as templates read them (`Message.as_turn`).
        tools: Definitions.
        cuts: For each text: how many turns it holds, and whether the generation prompt follows.
    """

    turns: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    cuts: Sequence[tuple[int, bool]]


class Sandbox:
    """The child process, started when it is first needed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._owner = 0
        self._is_child = False

    def render_here(self) -> None:
        """Render in this process from now on, which may end by it: for workers, whose parent tells why one ended."""
        self._is_child = True

    def start(self) -> None:
        """Start the child, which loads Transformers meanwhile; nothing if it runs."""
        with self._lock:
            self._running()

    def render(self, source: str, special: dict[str, Any], jobs: Sequence[Job]) -> list[list[str | RefusedError]]:
        """The texts of each job.

        Args:
            source: The Jinja text.
            special: Names and strings of special tokens.
            jobs: Conversations.

        Raises:
            TemplateLimitError: The template takes too long or too much memory.
        """
        if self._is_child:
            with _limited_memory():
                return [_rendered_here(source, special, job, row) for row, job in enumerate(jobs)]
        found: list[list[str | RefusedError]] = []
        with self._lock:
            for start in range(0, len(jobs), AT_ONCE):
                some = [(job.turns, job.tools, job.cuts) for job in jobs[start : start + AT_ONCE]]
                request = _packed([source, special, some])
                found += self._answered(request, len(some), start)
        return found

    def _answered(self, request: bytes, count: int, first: int) -> list[list[str | RefusedError]]:
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        answers: list[list[str | RefusedError]] = []
        is_whole = False
        try:
            _send(child.stdin, request)
            while len(answers) < count:
                line = _receive(child.stdout)
                if line is None:
                    raise TemplateLimitError(_why_it_ended(child.wait()), first + len(answers))
                answer = json.loads(line.decode("utf-8", "surrogatepass"))
                if isinstance(answer, str):
                    raise TemplateLimitError(answer, first + len(answers))
                longest, texts = answer
                answers.append([_unpacked(text, longest) for text in texts])
            is_whole = True
        except BrokenPipeError:
            raise TemplateLimitError(_why_it_ended(child.wait()), first) from None
        finally:
            if not is_whole:  # what it still has to say would be taken for the next answer
                self.stop()
        return answers

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None or self._owner != os.getpid():
            # -P and the parent's own path: a file in the working folder must not pass for a module.
            path = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "veneer.data.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | path,
                start_new_session=True,  # Ctrl-C is the parent's to answer
            )
            self._owner = os.getpid()
        return self._child

    def stop(self) -> None:
        """End the child; another is started when one is needed."""
        if self._child is not None:
            self._child.kill()
            for stream in (self._child.stdin, self._child.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):  # a request that it did not read to the end
                    stream.close()
            self._child.wait()
        self._child = None


@cache
def shared() -> Sandbox:
    """The sandbox of this process: a child for each renderer would cost a second each."""
    sandbox = Sandbox()
    atexit.register(sandbox.stop)
    return sandbox


def _why_it_ended(status: int) -> str:
    if hasattr(signal, "SIGPROF") and status == -signal.SIGPROF:
        return TOO_LONG
    return f"ended the process that renders it (status {status}): it asks for too much memory, or nests too deep"


def _packed(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _unpacked(text: int | str | list[str], longest: str) -> str | RefusedError:
    if isinstance(text, int):
        return longest[:text]
    return text if isinstance(text, str) else RefusedError(text[0])


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(len(message).to_bytes(8, "little") + message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes | None:
    """A message; None: the other side has ended."""
    size = stream.read(8)
    message = stream.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
    return message if message else None


# Where templates are rendered: in the child, or in a worker.


def _rendered_here(source: str, special: dict[str, Any], job: Job, row: int) -> list[str | RefusedError]:
    try:
        texts = [_rendered(source, special, job.turns[:count], job.tools, prompt) for count, prompt in job.cuts]
    except MemoryError:
        raise TemplateLimitError(TOO_LARGE, row) from None
    return [text if isinstance(text, str) else RefusedError(text[0]) for text in texts]


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    from transformers.utils import chat_template_utils  # loaded before memory is limited

    assert chat_template_utils is not None
    with _limited_memory():
        _answer_all(requests, answers)


def _answer_all(requests: IO[bytes], answers: IO[bytes]) -> None:
    while (request := _receive(requests)) is not None:
        source, special, jobs = json.loads(request.decode("utf-8", "surrogatepass"))
        room = TEXT + 4 * len(request)
        for turns, tools, cuts in jobs:
            try:
                texts = [_rendered(source, special, turns[:count], tools, prompt) for count, prompt in cuts]
                room -= max((len(text) for text in texts if isinstance(text, str)), default=0)
                told = _shortened(texts) if room >= 0 else f"renders a few rows as more than {TEXT:,} characters"
                answer = _packed(told)
            except MemoryError:
                answer = _packed(TOO_LARGE)
            _send(answers, answer)


def _shortened(texts: list[Any]) -> tuple[str, list[Any]]:
    """The longest text, and of those that it begins with their lengths alone: turns follow each other as a rule."""
    longest = max((text for text in texts if isinstance(text, str)), key=len, default="")
    return longest, [len(t) if isinstance(t, str) and longest.startswith(t) else t for t in texts]


def _rendered(source: str, special: dict[str, Any], turns: Any, tools: Any, prompt: bool) -> str | list[str]:
    """The text, or in a list the reason why the template refuses."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_time(SECONDS)
    try:  # what apply_chat_template calls; that itself refuses an empty conversation
        texts, _ = render_jinja_template(
            conversations=[turns], tools=tools or None, chat_template=source, add_generation_prompt=prompt, **special
        )
    except (
        TemplateError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        return [str(error) or type(error).__name__]
    finally:
        _limit_time(0)
    text: str = texts[0]
    return text


def _limit_time(seconds: float) -> None:
    """Let the kernel end this process after so much CPU time; 0: no more."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Let this process take no more than MEMORY beyond what it has."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as sizes:
            taken = int(sizes.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # not Linux
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + MEMORY if before[0] == resource.RLIM_INFINITY else min(taken + MEMORY, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


if __name__ == "__main__":
    # Only answers go to the parent, whatever a library prints.
    with os.fdopen(os.dup(1), "wb") as told:
        os.dup2(2, 1)
        _serve(sys.stdin.buffer, told)
