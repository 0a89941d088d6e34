"""Replies in OpenAI's form: whole, and as server-sent events while answers are made."""

import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.serving.adapters import Served
from veneer.serving.generation import Token
from veneer.serving.tool_calls import Call, CallForm, as_dicts

DONE = "data: [DONE]\n\n"


@dataclass
class Answer:
    """One choice as far as it has come.

    Attributes:
        text: Its text.
        tokens: Its tokens, where log-probabilities are asked for.
        reason: Why it ended.
        made: Tokens that were made.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None
    made: int = 0


@dataclass(frozen=True)
class Asked:
    """What was asked, as replies need it.

    Attributes:
        id: Id of the reply.
        model: The model.
        is_chat: Whether messages are answered, or a text is continued.
        with_logprobs: Whether log-probabilities are asked for.
        by_ids: Whether tokens are named by their ids.
        calls: The form of calls to look for; None: no tools may be called.
        prompt_tokens: Tokens of each choice's prompt.
        read_tokens: Tokens of all prompts together, each counted once.
    """

    id: str
    model: Served
    is_chat: bool
    with_logprobs: bool
    by_ids: bool
    calls: CallForm | None
    read_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], cached: int) -> dict[str, Any]:
        """Return the whole reply."""
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        return self._head("chat.completion" if self.is_chat else "text_completion") | {
            "choices": choices,
            "usage": self.usage(answers, cached),
        }

    def usage(self, answers: Sequence[Answer], cached: int) -> dict[str, Any]:
        """Return the tokens that were read and made."""
        made = sum(answer.made for answer in answers)
        return {
            "prompt_tokens": self.read_tokens,
            "completion_tokens": made,
            "total_tokens": self.read_tokens + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def chunk(self, number: int, delta: dict[str, Any] | str, tokens: Sequence[Token], reason: str | None) -> str:
        """Return an event with more of a choice."""
        choice: dict[str, Any] = {"index": number, "finish_reason": reason}
        choice |= {"delta": delta} if self.is_chat else {"text": delta}
        choice["logprobs"] = self._logprobs(tokens, 0) if self.with_logprobs else None
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return event(self._head(kind) | {"choices": [choice]})

    def usage_chunk(self, answers: Sequence[Answer], cached: int) -> str:
        """Return the last event, with the tokens that were read and made."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return event(self._head(kind) | {"choices": [], "usage": self.usage(answers, cached)})

    def _head(self, kind: str) -> dict[str, Any]:
        sha256 = self.model.sha256 or self.model.cache_key
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": f"fp_{sha256[:12]}",
        }

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        found: dict[str, Any] = {"index": number, "finish_reason": answer.reason}
        found["logprobs"] = self._logprobs(answer.tokens, 0) if self.with_logprobs else None
        if not self.is_chat:
            return found | {"text": answer.text}
        text, calls = self.calls.read(answer.text) if self.calls is not None else (answer.text, list[Call]())
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = as_dicts(calls)
            found["finish_reason"] = "tool_calls"
        return found | {"message": message}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """Return log-probabilities; a completion has them in its older form as well."""
        content = [
            self._entry(token.id, token.logprob)
            | {"top_logprobs": [self._entry(other.id, other.logprob) for other in token.likeliest]}
            for token in tokens
        ]
        if self.is_chat:
            return {"content": content, "refusal": None}
        offsets = []
        for entry in content:
            offsets.append(offset)
            offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in content],
            "token_logprobs": [entry["logprob"] for entry in content],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in content],
            "text_offset": offsets,
            "content": content,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = str(self.model.renderer.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        name = f"token_id:{token}" if self.by_ids else text
        return {"token": name, "logprob": max(logprob, -9999.0), "bytes": list(text.encode(errors="replace"))}


class CallStream:
    """Text of a streamed answer, with calls held back until they are whole.

    Args:
        form: Form of the calls.
    """

    def __init__(self, form: CallForm) -> None:
        self._form, self._text, self._shown = form, "", 0

    def put(self, text: str) -> str:
        """Take text; return what is no part of a call for certain."""
        self._text += text
        until = max(self._shown, self._form.starts(self._text))
        shown, self._shown = self._text[self._shown : until], until
        return shown

    def end(self) -> tuple[str, list[Call]]:
        """Return the text that is left, and the calls."""
        _, calls = self._form.read(self._text)
        return ("" if calls else self._text[self._shown :]), calls


def event(value: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def first_chunks(asked: Asked, count: int) -> Iterator[str]:
    """Return the events that begin each choice of a chat."""
    if asked.is_chat:
        for number in range(count):
            yield asked.chunk(number, {"role": "assistant", "content": ""}, (), None)


Stream = AsyncIterator[str]
