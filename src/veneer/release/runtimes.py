"""An artifact as its users will run it: messages in, an answer out, with what the certificate looks at.

    Folder      a Transformers folder: its own tokenizer, template and generation settings, nothing of Veneer's
    Endpoint    an OpenAI-compatible server; llama.cpp's is started here for a GGUF file (`llama_server`)

Each says which tokens it makes of a conversation and answers greedily, with the log-probabilities of the likeliest
tokens at every step. What a server does not tell (the tokens of a prompt, say) is None and is not checked, not guessed.
"""

import json
import os
import re
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from veneer.config import JobError, UserError
from veneer.data import Message
from veneer.evaluate.generation import contiguous_head_input
from veneer.model.quiet import quiet
from veneer.plan.machine import Machine

TOP = 100  # likeliest tokens that are looked at; the rest is one bucket
TOP_OF_A_SERVER = 20  # what OpenAI's protocol allows
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: As its user sees it.
        ids: Its tokens, without the one that ended it; None: the server does not tell.
        stopped: Whether it ended by itself, not at the limit.
        steps: At each of its tokens the log-probabilities of the likeliest tokens by id.
    """

    text: str
    ids: list[int] | None
    stopped: bool
    steps: list[dict[int, float]]


class Runtime(Protocol):
    """Something that runs an artifact."""

    kind: str

    def prompt_ids(self, messages: Sequence[Message]) -> list[int] | None:
        """The tokens it makes of a conversation to be answered; None: it does not tell."""
        ...

    def prompt_count(self, messages: Sequence[Message]) -> int | None:
        """How many tokens it counts in such a conversation; None: it does not tell."""
        ...

    def answer(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        """Greedy answers."""
        ...

    def stop_ids(self) -> set[int] | None:
        """Tokens at which it ends an answer; None: it does not tell."""
        ...


class Folder:
    """A folder in Transformers' format.

    Raises:
        UserError: It holds no model that loads.
    """

    kind = "transformers"

    def __init__(self, path: Path, machine: Machine) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with quiet():
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(path)
                self.model = AutoModelForCausalLM.from_pretrained(
                    path, dtype="auto", device_map={"": machine.device}
                ).eval()
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"{path}: does not load in Transformers: {reason}") from None

    def prompt_ids(self, messages: Sequence[Message]) -> list[int] | None:
        if not self.tokenizer.chat_template:
            ids = self.tokenizer("".join(message.content for message in messages))["input_ids"]
        else:
            turns = [message.as_turn() for message in messages]
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        return list(ids)

    def prompt_count(self, messages: Sequence[Message]) -> int | None:
        return None  # the ids say more

    def answer(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        ids = [self.prompt_ids(messages) or [] for messages in prompts]
        return greedy(self.model, self.tokenizer, ids, max_new_tokens, self.stop_ids())

    def stop_ids(self) -> set[int]:
        named = self.model.generation_config.eos_token_id
        return set(named) if isinstance(named, list) else {named} - {None}


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: set[int], batch: int = 8
) -> list[Answer]:
    """Greedy answers of a Transformers model to token ids, with the likeliest tokens at each step."""
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=True,
    )
    device = model.get_input_embeddings().weight.device
    answers: list[Answer | None] = [None] * len(prompts)
    for chosen in _batches(prompts, batch):
        ids_BL, mask_BL = padded([prompts[n] for n in chosen], pad)
        with quiet(), contiguous_head_input(model):
            output = model.generate(
                input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), generation_config=config
            )
        tops = [logits_BV.float().log_softmax(-1).topk(min(TOP, logits_BV.shape[-1])) for logits_BV in output.logits]
        new_BT = output.sequences[:, ids_BL.shape[1] :].tolist()
        for row, n in enumerate(chosen):
            ends = [at for at, token in enumerate(new_BT[row]) if token in stop_ids]
            kept = new_BT[row][: ends[0]] if ends else new_BT[row]
            steps = [
                dict(zip(top.indices[row].tolist(), top.values[row].tolist())) for top in tops[: len(kept) + bool(ends)]
            ]
            text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers[n] = Answer(text.strip(), kept, bool(ends), steps)
    return [answer for answer in answers if answer is not None]


def _batches(prompts: Sequence[list[int]], most: int) -> Iterator[list[int]]:
    """Numbers of prompts that are answered together: of like length, so that little is padded."""
    chosen: list[int] = []
    for n in sorted(range(len(prompts)), key=lambda n: len(prompts[n])):
        if chosen and (len(chosen) == most or len(prompts[n]) > 1.5 * len(prompts[chosen[0]]) + 32):
            yield chosen
            chosen = []
        chosen.append(n)
    if chosen:
        yield chosen


def padded(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens padded on the left, and their mask; both int64 [rows, longest]."""
    longest = max(1, *(len(row) for row in rows))
    ids_BL = torch.full((len(rows), longest), pad)
    mask_BL = torch.zeros_like(ids_BL)
    for n, row in enumerate(rows):
        if row:
            ids_BL[n, longest - len(row) :] = torch.tensor(row)
            mask_BL[n, longest - len(row) :] = 1
    return ids_BL, mask_BL


class Endpoint:
    """An OpenAI-compatible server.

    Args:
        url: Its address, with or without /v1.
        chat: Whether prompts go to /chat/completions, as messages; else as plain text to /completions.
        top: Likeliest tokens to ask for.
        stops: Tokens that it ends at, where its file says so.

    Raises:
        UserError: Nothing answers there.
    """

    def __init__(
        self, url: str, chat: bool, top: int = TOP_OF_A_SERVER, stops: set[int] | None = None, kind: str = "endpoint"
    ) -> None:
        self.kind = kind
        self.address = url
        self._root = re.sub(r"/v1/?$", "", url.rstrip("/"))
        self._chat, self._top, self._stops = chat, top, stops
        listed = self._ask("/v1/models", None)
        if not isinstance(listed, dict) or not listed.get("data"):
            raise UserError(f"{url}: no OpenAI-compatible server answers there (GET /v1/models)", "start it first")
        self._model = listed["data"][0]["id"]

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

    def stop_ids(self) -> set[int] | None:
        return self._stops

    def _complete(self, messages: Sequence[Message], max_new_tokens: int) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "model": self._model,
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "return_tokens_as_token_ids": True,
        }
        if self._chat:
            turns = [message.as_turn() for message in messages]
            asked |= {"messages": turns, "logprobs": True, "top_logprobs": self._top}
            path = "/v1/chat/completions"
        else:
            asked |= {"prompt": self._text(messages), "logprobs": self._top}
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
        stopped = choice["finish_reason"] == "stop"
        if known is not None and stopped and known and known[-1] in (self._stops or set()):
            known = known[:-1]
        return Answer((text or "").strip(), known, stopped, steps)

    @staticmethod
    def _text(messages: Sequence[Message]) -> str:
        return "".join(message.content for message in messages)

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            try:
                return json.loads(error.read())
            except ValueError:
                return None
        except (OSError, ValueError):
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


@contextmanager
def llama_server(file: Path, chat: bool, stops: set[int], context: int, lora: Path | None = None) -> Iterator[Endpoint]:
    """llama.cpp's own server on a GGUF file, within this process, on a free port of this machine.

    Args:
        file: The model.
        chat: Whether it is asked with messages.
        stops: Tokens that the file names as ends.
        context: Tokens it must hold.
        lora: An adapter to be put on it.

    Raises:
        UserError: `xllamacpp` is not installed, or llama.cpp does not load the file.
    """
    try:
        import xllamacpp
    except ImportError:
        raise UserError(
            "GGUF files are proved in llama.cpp, which is not installed",
            "pip install 'veneer[llamacpp]', or leave the proof out with --no-certify",
        ) from None
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel = context, 1
    settings.warmup, settings.ui, settings.verbosity = False, False, 1
    settings.use_jinja = True
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
    try:
        yield Endpoint(server.listening_address, chat, TOP, stops, "llama.cpp")
    finally:
        del server
