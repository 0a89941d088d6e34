"""Asks an artifact through an OpenAI-compatible HTTP server; llama.cpp's own server is started here."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import veneer
from veneer.config import JobError, UserError
from veneer.config.files import reason
from veneer.data.conversation import Message
from veneer.machine.concurrent import as_they_come
from veneer.release.certify.client import Client, NoAnswerError
from veneer.release.certify.runtimes import TOP, Answer

Tools = tuple[dict[str, Any], ...]

TOP_OF_A_SERVER = 20  # what OpenAI's protocol allows
TIMEOUT_SECONDS = 600.0  # of a whole answer
REMAKE = "export it again, or name another file"


class Endpoint:
    """An OpenAI-compatible server.

    Args:
        url: Address, with or without /v1.
        chat: Whether prompts go to /chat/completions, as messages; else as plain text to /completions.
        top: Likeliest tokens to ask for.
        stops: Tokens that end an answer, where its file says so.
        kind: Name in the certificate.
        model: Name of the model to ask; None: its only one.
        option: Option that names the model.
        is_own: Whether it was started here.

    Attributes:
        model: Name of the model that is asked.

    Raises:
        UserError: Nothing answers there, or it has several models and none of them is named.
    """

    def __init__(
        self,
        url: str,
        chat: bool,
        top: int = TOP_OF_A_SERVER,
        stops: set[int] | None = None,
        kind: str = "endpoint",
        model: str | None = None,
        option: str = "--model",
        is_own: bool = False,
    ) -> None:
        self.kind = kind
        self.address = url
        self._client = Client(url, is_own=is_own)
        self._chat, self._top, self._stops = chat, top, stops
        self.model = self._client.find_model(model, option)

    @property
    def is_chat(self) -> bool:
        """Whether prompts go to it as messages."""
        return self._chat

    def prompt_ids(self, messages: Sequence[Message]) -> list[int] | None:
        turns = [message.as_turn() for message in messages]
        if not self._chat:
            asked = {"content": self._text(messages), "add_special": True, "parse_special": True}
            return _tokens(self._try("/tokenize", asked))
        applied = self._try("/apply-template", {"messages": turns})
        if isinstance(applied, dict) and "prompt" in applied:  # llama.cpp
            asked = {"content": applied["prompt"], "add_special": True, "parse_special": True}
            made = self._try("/tokenize", asked)
        else:  # vLLM
            made = self._try("/tokenize", {"model": self.model, "messages": turns, "add_generation_prompt": True})
        return _tokens(made)

    def prompt_count(self, messages: Sequence[Message]) -> int | None:
        with self._protocol():
            made = self._complete(messages, 1)
            count = (made.get("usage") or {}).get("prompt_tokens")
            return None if count is None else int(count)

    def answer(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        with self._protocol():
            return [self._answer(self._complete(messages, max_new_tokens)) for messages in prompts]

    def texts(
        self,
        prompts: Sequence[Sequence[Message]],
        max_new_tokens: int,
        at_once: int = 1,
        on_done: Callable[[int], None] = lambda done: None,
        tools: Sequence[Tools] | None = None,
        on_text: Callable[[int, str], None] = lambda number, text: None,
    ) -> list[str]:
        """Generate greedy answers as text alone, in the order of the prompts; calls stand in it in Hermes' form.

        Args:
            prompts: Conversations to be answered.
            max_new_tokens: Longest answer.
            at_once: Number of concurrent requests; the server should have as many slots.
            on_done: Callback that gets the number of prompts just answered.
            tools: Tools that each answer may call; None: none may call any.
            on_text: Callback that gets the number of a prompt and its answer, as answers come.
        """

        def ask(number: int) -> tuple[int, str]:
            offered = tools[number] if tools is not None else ()
            with self._protocol():
                choice = self._complete(prompts[number], max_new_tokens, False, offered)["choices"][0]
                text = _text_of(choice["message"]) if self._chat else str(choice["text"] or "").strip()
            return number, text

        texts = {}
        for number, text in as_they_come(ask, range(len(prompts)), at_once):
            texts[number] = text
            on_text(number, text)
            on_done(1)
        return [texts[number] for number in range(len(prompts))]

    def stop_ids(self) -> set[int] | None:
        return self._stops

    def _complete(
        self, messages: Sequence[Message], max_new_tokens: int, with_likely: bool = True, tools: Tools = ()
    ) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "return_tokens_as_token_ids": True,
        }
        if self._chat:
            turns = [message.as_turn() for message in messages]
            asked |= {"messages": turns}
            asked |= {"logprobs": True, "top_logprobs": self._top} if with_likely else {}
            asked |= {"tools": [{"type": "function", "function": _function(tool)} for tool in tools]} if tools else {}
            path = "/v1/chat/completions"
        else:
            asked |= {"prompt": self._text(messages)}
            asked |= {"logprobs": self._top} if with_likely else {}
            path = "/v1/completions"
        try:
            made = self._ask(path, asked)
        except NoAnswerError as error:
            fix = f"\n  fix: {error.fix}" if error.fix else ""
            raise JobError(f"{self._client.root}{path}: {error}{fix}") from None
        if not isinstance(made, dict) or "choices" not in made:
            raise JobError(f"{self._client.root}{path}: the server answered {json.dumps(made)[:300]}")
        return dict(made)

    def _answer(self, made: dict[str, Any]) -> Answer:
        choice = made["choices"][0]
        text = choice["message"]["content"] if self._chat else choice["text"]
        content = (choice.get("logprobs") or {}).get("content") or []
        ids = [_token_id(entry) for entry in content]
        steps = []
        for entry in content:
            likely = ((_token_id(top), float(top["logprob"])) for top in entry.get("top_logprobs", []))
            steps.append({number: value for number, value in likely if number is not None})
        known = None if not content or any(number is None for number in ids) else [n for n in ids if n is not None]
        if known is None:  # a server that names tokens by their texts alone: what they are is not guessed
            steps = []
        stopped = choice["finish_reason"] == "stop"
        if known is not None and stopped and known and known[-1] in (self._stops or set()):
            known = known[:-1]
        return Answer((text or "").strip(), known, stopped, steps)

    @contextmanager
    def _protocol(self) -> Iterator[None]:
        """Turn answers that are not of OpenAI's form into one message."""
        try:
            yield
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            message = f"{self.address}: its answers are not those of an OpenAI-compatible server: {reason(error)}"
            raise JobError(message) from None

    @staticmethod
    def _text(messages: Sequence[Message]) -> str:
        return "".join(message.content for message in messages)

    def _ask(self, path: str, body: dict[str, Any], is_once: bool = False) -> Any:
        return self._client.ask(path, body, TIMEOUT_SECONDS, is_once)

    def _try(self, path: str, body: dict[str, Any]) -> Any:
        """Return the answer to what not every server knows; None: there is none."""
        with suppress(NoAnswerError):
            return self._ask(path, body, is_once=True)
        return None


def _text_of(message: dict[str, Any]) -> str:
    """Return an answer's text, and behind it the calls that a server took out of it."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    parts = [(message.get("content") if calls else message["content"]) or ""]
    for call in calls:
        value = {"name": call["name"], "arguments": json.loads(call["arguments"] or "{}")}
        parts.append(f"<tool_call>{json.dumps(value, ensure_ascii=False)}</tool_call>")
    return "\n".join(part.strip() for part in parts if part)


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool, which rows write with or without `{"type": "function"}` around it."""
    found: dict[str, Any] = tool.get("function", tool)
    return found


def _tokens(made: Any) -> list[int] | None:
    """Return the token ids of an answer; None: it holds none."""
    found = made.get("tokens") if isinstance(made, dict) else None
    return found if isinstance(found, list) and all(isinstance(token, int) for token in found) else None


def _token_id(entry: dict[str, Any]) -> int | None:
    if isinstance(entry.get("id"), int):
        return int(entry["id"])
    found = re.fullmatch(r"token_id:(\d+)", str(entry.get("token", "")))
    return int(found[1]) if found else None


def require_llama_cpp() -> None:
    """Raise UserError where llama.cpp is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError(
            "GGUF files are run by llama.cpp, which is not installed",
            "pip install 'veneer[llamacpp]' (or skip an export's certificate with --no-certify)",
        )


@contextmanager
def llama_server(
    file: Path, chat: bool, stops: set[int], context: int, lora: Path | None = None, slots: int = 1
) -> Iterator[Endpoint]:
    """Start llama.cpp's own server on a GGUF file, as a process of its own, on a free port of this machine.

    Args:
        file: The model.
        chat: Whether it is asked with messages.
        stops: Tokens that the file names as ends.
        context: Tokens that each slot must hold.
        lora: An adapter to be put on it.
        slots: Conversations that are answered at once.

    Raises:
        UserError: `xllamacpp` is not installed, or llama.cpp does not load the file.
        JobError: llama.cpp ended while it was asked.
    """
    require_llama_cpp()
    asked = json.dumps({"file": str(file), "context": context, "lora": lora and str(lora), "slots": slots})
    command = [sys.executable, "-m", "veneer.release.certify.llama_server", asked]
    source = str(Path(veneer.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=os.environ | {"PYTHONPATH": paths}
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            address = child.stdout.readline().decode().strip()  # nothing, where it ended
            if not address:
                raise UserError(f"{file}: llama.cpp does not load it: {_why_it_ended(child, log)}", REMAKE)
            try:
                with suppress(NoAnswerError):  # it listens before its queue runs, and that answers this
                    Client(address, is_own=True).ask("/slots", None, TIMEOUT_SECONDS)
                yield Endpoint(address, chat, TOP, stops, "llama.cpp", is_own=True)
            except (JobError, UserError):
                with suppress(subprocess.TimeoutExpired):
                    child.wait(1)  # its connections end a moment before it does
                if child.poll() is not None:
                    raise JobError(f"{file}: llama.cpp ended: {_why_it_ended(child, log)}") from None
                raise
        finally:
            child.stdin.close()  # the end of its input ends it
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def _why_it_ended(child: "subprocess.Popen[bytes]", log: IO[str]) -> str:
    """Return the error output of a child process that ended."""
    status = child.wait()
    log.seek(0)
    lines = log.read().splitlines()
    errors = [line.split(" E ", 1)[1].strip() for line in lines if " E " in line] or [
        line.strip() for line in lines if line.strip()
    ][-1:]
    ended = [f"it was ended by {signal.Signals(-status).name}"] if status < 0 else []
    return "; ".join((ended + errors)[:3]) or f"status {status}"
