"""A model on a server answers the rows and suites of any evaluation; llama.cpp serves a GGUF file for it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from veneer.config import JobError
from veneer.data.conversation import Conversation, Message
from veneer.data.pipeline import HeldOut
from veneer.data.render import Renderer
from veneer.evaluation.partial import KeptAnswers
from veneer.evaluation.responder import Progress, RowLosses
from veneer.release.certify.servers import Endpoint, llama_server

SLOTS = 8  # conversations at once: a step of llama.cpp answers them together, and each slot keeps what they begin with


class ServerResponder:
    """A model on an OpenAI-compatible server: a `Responder` without losses.

    Args:
        server: The server.
        reader: Renderer that read the rows; its form is that of right answers, and its run's system prompt is asked
            with. None: the server is asked what the rows say.
        with_system_prompt: Whether it is.
    """

    has_losses = False

    def __init__(self, server: Endpoint, reader: Renderer | None = None, with_system_prompt: bool = True) -> None:
        self._server, self.renderer = server, reader
        self._system = reader.settings.system_prompt if reader is not None and with_system_prompt else None

    @property
    def is_chat(self) -> bool:
        return self._server.is_chat

    def answer(
        self,
        asked: Sequence[Conversation],
        max_new_tokens: int,
        on_done: Progress = lambda done: None,
        kept: KeptAnswers | None = None,
    ) -> list[str]:
        # A server gives no tokens: the bytes of an answer stand for them among those that are kept. JSON may hold half
        # a surrogate pair, which is no UTF-8.
        known = {} if kept is None else kept.known
        texts = {row: bytes(ids).decode(errors="surrogatepass") for row, ids in known.items()}
        if texts:
            on_done(len(texts))
        left = [number for number in range(len(asked)) if number not in texts]

        def keep(number: int, text: str) -> None:
            texts[left[number]] = text
            if kept is not None:
                kept.keep({left[number]: list(text.encode(errors="surrogatepass"))})

        prompts, tools = [self._turns(asked[number]) for number in left], [asked[number].tools for number in left]
        try:
            self._server.texts(prompts, max_new_tokens, SLOTS, on_done, tools, keep)
        except JobError as error:
            if kept is None:
                raise
            raise JobError(f"{error}\n  {len(texts)} of {len(asked)} answers are kept: call again to go on") from None
        return [texts[number] for number in range(len(asked))]

    def losses(self, rows: Sequence[HeldOut]) -> RowLosses:
        raise NotImplementedError("a server measures no losses")

    def answer_losses(self, rows: Sequence[Conversation]) -> list[float]:
        raise NotImplementedError("a server measures no losses")

    def without_system_prompt(self) -> "ServerResponder":
        return ServerResponder(self._server, self.renderer, False)

    def _turns(self, row: Conversation) -> tuple[Message, ...]:
        turns = row.messages
        if not self.is_chat or self._system is None or (turns and turns[0].role == "system"):
            return turns
        return (Message("system", self._system), *turns)


def gguf_answers(
    file: Path,
    renderer: Renderer,
    asked: Sequence[Conversation],
    max_new_tokens: int,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return greedy answers, in the order of the conversations.

    Args:
        file: The GGUF file.
        renderer: Tokenizer and template of training; only its system prompt is used, since the file has its own.
        asked: Rows to be answered, without their last answers.
        max_new_tokens: Longest answer.
        on_done: Callback that gets the number of rows just answered.

    Raises:
        UserError: llama.cpp is not installed, or does not load the file.
    """
    prompts = [renderer.with_system(chat.prompt()) for chat in asked]
    longest = max(len(renderer.prompt_ids(turns)) for turns in prompts)
    with llama_server(file, renderer.is_chat, set(), longest + max_new_tokens + 16, slots=SLOTS) as server:
        return server.texts(prompts, max_new_tokens, SLOTS, on_done)
