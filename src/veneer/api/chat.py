"""A conversation with served models in this process: the same engine as `veneer serve`, without a server."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from veneer.config import JobError, UserError
from veneer.config.folder import write_text
from veneer.serving.errors import ApiError
from veneer.serving.generation import Piece
from veneer.serving.limits import Limits
from veneer.serving.protocol import ChatRequest
from veneer.serving.server import Wanted, named, opened
from veneer.serving.service import Service


class Chat:
    """A conversation.

    Args:
        service: Models and scheduler.
        model: The model that answers.

    Attributes:
        model: Name of the model; another one goes on with the same conversation.
        system: System prompt instead of the run's own; None: the run's own.
        turns: The conversation so far, without the system prompt.
    """

    def __init__(self, service: Service, model: str) -> None:
        self._service, self.model = service, model
        self.system: str | None = None
        self.turns: list[dict[str, str]] = []

    @property
    def models(self) -> list[str]:
        """Names of the models; the first is the base, where it is served."""
        return list(self._service.adapters.models)

    @property
    def base(self) -> str | None:
        """Name of the base; None: the only model is no base."""
        base = self._service.adapters.base
        return base.name if base.tuned is None else None

    def use(self, model: str) -> None:
        """Go on with another model.

        Raises:
            UserError: There is none of that name.
        """
        if model not in self.models:
            raise UserError(f"{model}: no such model", f"name one of: {', '.join(self.models)}")
        self.model = model

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def say(self, text: str, on_text: Callable[[str], None] = lambda piece: None, **sampling: Any) -> str:
        """Ask, and keep question and answer.

        Args:
            text: The question.
            on_text: Callback that gets each piece of the answer as it is made.
            sampling: Fields of a request: temperature, top_p, max_tokens, seed and others.

        Raises:
            UserError: The conversation has no room for it, or cannot be rendered.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        answer = self.answer(self.model, turns, on_text, **sampling)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def answer(
        self, model: str, turns: Sequence[dict[str, str]], on_text: Callable[[str], None], **sampling: Any
    ) -> str:
        """Return a model's answer to a conversation, which is not kept; arguments as of `say`."""
        system = self.system
        if system is None and model == self.base and self.model != model:  # beside a tuned model: asked the same
            system = self._service.adapters.get(self.model).renderer.settings.system_prompt
        before = [{"role": "system", "content": system}] if system is not None else []
        asked = ChatRequest.model_validate(
            {"temperature": 0, **sampling, "model": model, "messages": [*before, *turns]}
        )
        try:
            return asyncio.run(_answered(self._service, asked, on_text))
        except ApiError as error:
            raise (UserError if error.status == 400 else JobError)(error.message) from None

    def save(self, file: Path) -> None:
        """Write the conversation as a row of training data: JSON with `messages`, appended to a file.

        Raises:
            UserError: There is nothing to save, or the file cannot be written.
        """
        if not self.turns:
            raise UserError("/save: nothing was said yet", "ask something first")
        before = [{"role": "system", "content": self.system}] if self.system is not None else []
        line = json.dumps({"messages": [*before, *self.turns]}, ensure_ascii=False) + "\n"
        try:
            held = file.read_text(encoding="utf-8") if file.exists() else ""
            write_text(file, held + line)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"/save {file}: cannot be written ({error})", "name another file") from None


async def _answered(service: Service, asked: ChatRequest, on_text: Callable[[str], None]) -> str:
    job = await service.chat(asked)
    try:
        while not job.is_ended:
            _, event = await job.next()
            if isinstance(event, Piece):
                on_text(event.text)
    finally:
        service.cancel(job)
    return job.answers[0].text


@contextmanager
def chat(models: Sequence[str], *, base: str | None = None, force: bool = False) -> Iterator[Chat]:
    """Load models for a conversation, for a `with` block.

    Example:
        with veneer.chat(["runs/tickets"]) as chat:
            print(chat.say("My parcel never came"))

    Args:
        models: Runs, adapters or a base, which share one base, as for `veneer.serve`.
        base, force: See `veneer.serve`.

    Raises:
        UserError: A name stands for nothing, or the models share no base.
    """
    wanted = Wanted([named(model) for model in models], base, force, limits=Limits(slots=4))
    with opened(wanted) as service:
        yield Chat(service, wanted.models[0][0])
