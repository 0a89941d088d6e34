"""An artifact behind HTTP: an OpenAI-compatible server, asked as its users ask it; llama.cpp's is started here."""

import http.client
import importlib.util
import json
import os
import re
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.config import JobError, UserError
from veneer.data import Message
from veneer.release.runtimes import TOP, Answer

TOP_OF_A_SERVER = 20  # what OpenAI's protocol allows
TIMEOUT_SECONDS = 600


class Endpoint:
    """An OpenAI-compatible server.

    Args:
        url: Its address, with or without /v1.
        chat: Whether prompts go to /chat/completions, as messages; else as plain text to /completions.
        top: Likeliest tokens to ask for.
        stops: Tokens that it ends at, where its file says so.
        kind: What the certificate calls it.
        model: Which of its models is asked; None: its only one.

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
    ) -> None:
        self.kind = kind
        self.address = url
        self._root = re.sub(r"/v1/?$", "", url.rstrip("/"))
        self._chat, self._top, self._stops = chat, top, stops
        listed = self._ask("/v1/models", None)
        if not isinstance(listed, dict) or not listed.get("data"):
            raise UserError(f"{url}: no OpenAI-compatible server answers there (GET /v1/models)", "start it first")
        names = [str(entry["id"]) for entry in listed["data"]]
        if model is None and len(names) > 1:
            raise UserError(f"{url}: serves {len(names)} models: {', '.join(names[:6])}", "name one with --model")
        if model is not None and model not in names:
            raise UserError(f"--model {model}: {url} does not serve it", f"name one of {', '.join(names[:6])}")
        self._model = model or names[0]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int] | None:
        turns = [message.as_turn() for message in messages]
        if not self._chat:
            made = self._ask("/tokenize", {"content": self._text(messages), "add_special": True, "parse_special": True})
            return list(made["tokens"]) if made and "tokens" in made else None
        applied = self._ask("/apply-template", {"messages": turns})
        if applied and "prompt" in applied:  # llama.cpp
            asked = {"content": applied["prompt"], "add_special": True, "parse_special": True}
            made = self._ask("/tokenize", asked)
        else:  # vLLM
            made = self._ask("/tokenize", {"model": self._model, "messages": turns, "add_generation_prompt": True})
        return list(made["tokens"]) if made and "tokens" in made else None

    def prompt_count(self, messages: Sequence[Message]) -> int | None:
        made = self._complete(messages, 1)
        count = (made.get("usage") or {}).get("prompt_tokens")
        return None if count is None else int(count)

    def answer(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        return [self._answer(self._complete(messages, max_new_tokens)) for messages in prompts]

    def texts(
        self,
        prompts: Sequence[Sequence[Message]],
        max_new_tokens: int,
        at_once: int = 1,
        on_done: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """Greedy answers as text alone, in the order of the prompts.

        Args:
            prompts: Conversations to be answered.
            max_new_tokens: Longest answer.
            at_once: How many are asked at a time; the server should have as many slots.
            on_done: Called with the number of prompts just answered.
        """

        def ask(messages: Sequence[Message]) -> str:
            made = self._complete(messages, max_new_tokens, with_likely=False)
            on_done(1)
            choice = made["choices"][0]
            return ((choice["message"]["content"] if self._chat else choice["text"]) or "").strip()

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(ask, prompts))

    def stop_ids(self) -> set[int] | None:
        return self._stops

    def _complete(self, messages: Sequence[Message], max_new_tokens: int, with_likely: bool = True) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "model": self._model,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "return_tokens_as_token_ids": True,
        }
        if self._chat:
            turns = [message.as_turn() for message in messages]
            asked |= {"messages": turns}
            asked |= {"logprobs": True, "top_logprobs": self._top} if with_likely else {}
            path = "/v1/chat/completions"
        else:
            asked |= {"prompt": self._text(messages)}
            asked |= {"logprobs": self._top} if with_likely else {}
            path = "/v1/completions"
        made = self._ask(path, asked)
        if made is None or "choices" not in made:
            told = json.dumps(made)[:300] if made else "nothing"
            raise JobError(f"{self._root}{path}: the server answered {told}")
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

    @staticmethod
    def _text(messages: Sequence[Message]) -> str:
        return "".join(message.content for message in messages)

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        return _ask(self._root + path, body)


def _ask(url: str, body: dict[str, Any] | None) -> Any:
    """What a server answers, parsed; None: nothing that can be."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        try:
            return json.loads(error.read())
        except ValueError:
            return None
    except (OSError, ValueError, http.client.HTTPException):
        return None


def _token_id(entry: dict[str, Any]) -> int | None:
    if isinstance(entry.get("id"), int):
        return int(entry["id"])
    found = re.fullmatch(r"token_id:(\d+)", str(entry.get("token", "")))
    return int(found[1]) if found else None


@contextmanager
def _native_errors() -> Iterator[list[str]]:
    """Catch what native code writes to standard error; its lines are there when the block has ended."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            lines += caught.read().decode(errors="replace").splitlines()


def require_llama_cpp() -> None:
    """Raises UserError where llama.cpp is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError(
            "GGUF files are proved in llama.cpp, which is not installed",
            "pip install 'veneer[llamacpp]', or leave the proof out with --no-certify",
        )


@contextmanager
def llama_server(
    file: Path, chat: bool, stops: set[int], context: int, lora: Path | None = None, slots: int = 1
) -> Iterator[Endpoint]:
    """llama.cpp's own server on a GGUF file, within this process, on a free port of this machine.

    Args:
        file: The model.
        chat: Whether it is asked with messages.
        stops: Tokens that the file names as ends.
        context: Tokens that each slot must hold.
        lora: An adapter to be put on it.
        slots: Conversations that are answered at once.

    Raises:
        UserError: `xllamacpp` is not installed, or llama.cpp does not load the file.
    """
    require_llama_cpp()
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel = context * slots, slots
    settings.warmup, settings.ui, settings.verbosity = False, False, 1
    settings.use_jinja, settings.endpoint_slots = True, True
    settings.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    if lora is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    with _native_errors() as errors:
        try:
            server = xllamacpp.Server(settings)
        except RuntimeError as error:
            server, reason = None, str(error)
    if server is None:
        told = [line.split(" E ", 1)[1].strip() for line in errors if " E " in line]
        raise UserError(f"{file}: llama.cpp does not load it: {'; '.join(told[:2]) or reason}")
    # It listens before its queue runs, and one that is let go between the two never ends: its queue answers this.
    _ask(f"{server.listening_address}/slots", None)
    try:
        yield Endpoint(server.listening_address, chat, TOP, stops, "llama.cpp")
    finally:
        del server
