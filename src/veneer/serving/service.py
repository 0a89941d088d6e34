"""From a request to the answers that are made for it: prompts rendered as in training, limits, settings, grammars."""

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.config import UserError
from veneer.data.conversation import BadRowError, Message
from veneer.data.template import begin_ids
from veneer.data.turns import read_tools, read_turns
from veneer.serving.adapters import Adapters, Served
from veneer.serving.detokenize import TextOfTokens
from veneer.serving.errors import ApiError
from veneer.serving.generation import Event, Generation, Piece
from veneer.serving.grammar import ANY_OBJECT, Grammars, Matcher
from veneer.serving.limits import Limits
from veneer.serving.metrics import Metrics
from veneer.serving.protocol import ChatRequest, CompletionRequest, SampledRequest, TokenizeRequest
from veneer.serving.replies import Answer, Asked
from veneer.serving.sampling import seed_of
from veneer.serving.scheduler import Scheduler


@dataclass
class Job:
    """The answers to one request.

    Attributes:
        asked: Request, as replies need it.
        generations: The answers that are made.
        answers: The same as far as they have come.
    """

    asked: Asked
    generations: list[Generation]
    answers: list[Answer]
    cached: int = 0
    _events: "asyncio.Queue[tuple[int, Event]]" = field(default_factory=asyncio.Queue)

    async def next(self) -> tuple[int, Event]:
        """Wait for the next event of an answer, and note it in `answers`.

        Raises:
            ApiError: An answer was given up.
        """
        number, event = await self._events.get()
        answer = self.answers[number]
        if isinstance(event, ApiError):
            raise event
        if isinstance(event, Piece):
            answer.text += event.text
            answer.tokens += event.tokens
        else:
            answer.reason, answer.made = event.reason, event.tokens
            self.cached += event.cached
        return number, event

    @property
    def is_ended(self) -> bool:
        """Whether all answers are whole."""
        return all(answer.reason is not None for answer in self.answers)

    def teller(self, number: int) -> Callable[[Event], None]:
        """Return what takes the events of one answer, on any thread, for the loop that runs now."""
        loop, events = asyncio.get_running_loop(), self._events

        def tell(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (number, event))

        return tell


class Service:
    """What routes call.

    Args:
        adapters: The models.
        scheduler: Thread that makes the answers.
        grammars: Makes matchers of JSON.
        limits, metrics: Those of the server.
    """

    def __init__(
        self, adapters: Adapters, scheduler: Scheduler, grammars: Grammars, limits: Limits, metrics: Metrics
    ) -> None:
        self.adapters, self.scheduler, self.limits, self.metrics = adapters, scheduler, limits, metrics
        self._grammars = grammars
        self._rendering = threading.Lock()  # a renderer is used by one thread at a time

    @property
    def most_tokens(self) -> int:
        """Tokens of a prompt and its answer, at most."""
        return self.scheduler.batch.most_tokens

    async def chat(self, request: ChatRequest) -> Job:
        """Begin to answer messages."""
        tools: tuple[dict[str, Any], ...] = ()
        if request.tool_choice not in (None, "auto", "none"):
            raise ApiError(400, "tool_choice: auto and none are known here", "tool_choice")
        if request.tools and request.tool_choice != "none":
            try:
                tools = read_tools(request.tools)
            except BadRowError as error:
                raise ApiError(400, f"tools: {error}", "tools") from None
        model = self.adapters.hold(request.model)
        try:
            ids = await asyncio.to_thread(self._rendered, model, request.messages, tools)
            asked = self._asked("chatcmpl", model, request, len(ids), bool(tools))
            return await self._begin(model, request, asked, [ids], request.most_tokens, request.likeliest)
        finally:
            self.adapters.release(model)

    async def complete(self, request: CompletionRequest) -> Job:
        """Begin to continue texts."""
        model = self.adapters.hold(request.model)
        try:
            prompts = await asyncio.to_thread(self._prompts, model, request.prompt)
            asked = self._asked("cmpl", model, request, sum(map(len, prompts)), False)
            return await self._begin(model, request, asked, prompts, request.most_tokens or 16, request.likeliest)
        finally:
            self.adapters.release(model)

    def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """Return the tokens of a conversation or a text, in vLLM's form."""
        model = self.adapters.get(request.model or self.adapters.base.name)
        if request.messages is not None:
            ids = self._rendered(model, request.messages, read_tools(request.tools))
        elif request.prompt is not None:
            ids = self._text_ids(model, request.prompt)
        else:
            raise ApiError(400, "messages or prompt is needed", "messages")
        return {"count": len(ids), "max_model_len": self.most_tokens, "tokens": ids}

    def cancel(self, job: Job) -> None:
        """Give up what is not finished of a job."""
        for generation in job.generations:
            if not generation.is_over:
                self.scheduler.cancel(generation)

    def _rendered(
        self, model: Served, messages: Sequence[dict[str, Any]], tools: tuple[dict[str, Any], ...]
    ) -> list[int]:
        """Return the tokens of a conversation, by the renderer of training."""
        try:
            turns = list(read_turns(list(messages)))
            with self._rendering:
                return model.renderer.prompt_ids(turns, tools)
        except BadRowError as error:
            raise ApiError(400, f"messages: {error}", "messages") from None
        except UserError as error:
            raise ApiError(400, f"messages: {str(error).splitlines()[0]}", "messages") from None

    def _prompts(self, model: Served, prompt: Any) -> list[list[int]]:
        """Return the tokens of the prompts of a completion: a text, token ids, or a list of either."""
        vocabulary = len(model.renderer.tokenizer)
        is_ids = isinstance(prompt, list) and bool(prompt) and all(isinstance(one, int) for one in prompt)
        prompts = [prompt] if isinstance(prompt, str) or is_ids else prompt
        if not prompts or len(prompts) > self.limits.slots:
            raise ApiError(400, f"prompt: 1 to {self.limits.slots} prompts are taken at a time", "prompt")
        found = []
        for one in prompts:
            if isinstance(one, str):
                found.append(self._text_ids(model, one))
            elif isinstance(one, list) and all(type(token) is int and 0 <= token < vocabulary for token in one):
                found.append(list(one))
            else:
                raise ApiError(400, f"prompt: a text, or token ids from 0 to {vocabulary - 1}", "prompt")
        return found

    def _text_ids(self, model: Served, text: str) -> list[int]:
        """Return the tokens of a plain text: as training renders it where it has no template."""
        if not model.renderer.is_chat:
            try:
                with self._rendering:
                    return model.renderer.prompt_ids([Message("user", text)])
            except UserError as error:
                raise ApiError(400, str(error).splitlines()[0], "prompt") from None
        tokenizer = model.renderer.tokenizer
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return [*begin_ids(tokenizer), *ids]

    def _asked(self, kind: str, model: Served, request: SampledRequest, tokens: int, with_tools: bool) -> Asked:
        is_chat = isinstance(request, ChatRequest)
        likeliest = request.likeliest if isinstance(request, ChatRequest | CompletionRequest) else None
        return Asked(
            id=f"{kind}-{secrets.token_hex(12)}",
            model=model,
            is_chat=is_chat,
            with_logprobs=likeliest is not None,
            by_ids=bool(request.return_tokens_as_token_ids),
            calls=model.calls if with_tools else None,
            read_tokens=tokens,
        )

    async def _begin(
        self,
        model: Served,
        request: SampledRequest,
        asked: Asked,
        prompts: list[list[int]],
        most_tokens: int | None,
        likeliest: int | None,
    ) -> Job:
        """Submit the answers to all prompts."""
        limits = [self._limit(ids, most_tokens) for ids in prompts]
        count = request.n or 1
        if len(prompts) * count > self.limits.slots:
            raise ApiError(400, f"n: {self.limits.slots} answers are made at a time", "n")
        vocabulary = len(model.renderer.tokenizer)
        seed = request.seed_or_random()
        deadline = time.monotonic() + self.limits.seconds
        job = Job(asked, [], [Answer() for _ in range(len(prompts) * count)])
        for number in range(len(prompts) * count):
            ids = prompts[number // count]
            decoding = request.decoding(number % count, seed)
            if any(not 0 <= token < vocabulary for token in decoding.logit_bias):
                raise ApiError(400, f"logit_bias: token ids are 0 to {vocabulary - 1}", "logit_bias")
            job.generations.append(
                Generation(
                    prompt=ids,
                    adapter=model.number,
                    cache_key=model.cache_key,
                    limit=limits[number // count],
                    stop_ids=model.stop_ids,
                    text=TextOfTokens(model.renderer.tokenizer, request.stops),
                    decoding=replace(decoding, seed=seed_of(ids, decoding.seed)),
                    tell=job.teller(number),
                    deadline=deadline,
                    likeliest=likeliest,
                    grammar=await asyncio.to_thread(self._matcher, model, request),
                    on_end=lambda: self.adapters.release(model),
                )
            )
        for _ in job.generations:
            self.adapters.hold_again(model)
        try:
            self.scheduler.submit(job.generations)
        except ApiError:
            for _ in job.generations:
                self.adapters.release(model)
            raise
        return job

    def _limit(self, ids: list[int], most_tokens: int | None) -> int:
        """Return the most tokens of an answer to a prompt."""
        room = self.most_tokens - len(ids)
        if not ids:
            raise ApiError(400, "the prompt is empty", "messages")
        if room < 1 or (most_tokens is not None and most_tokens > room):
            raise ApiError(
                400,
                f"the prompt has {len(ids):,} tokens and asks for {most_tokens or 1:,} more; prompt and answer "
                f"have room for {self.most_tokens:,} together",
                "max_tokens",
                "context_length_exceeded",
            )
        return min(room, most_tokens or self.limits.max_tokens)

    def _matcher(self, model: Served, request: SampledRequest) -> Matcher | None:
        form = request.response_format
        if form is None or form.type == "text":
            return None
        schema = ANY_OBJECT
        if form.type == "json_schema":
            if form.json_schema is None:
                raise ApiError(400, "response_format: json_schema needs a schema", "response_format")
            schema = form.json_schema.schema_
        return self._grammars.matcher(model.renderer, model.stop_ids, schema)
