"""One interface to whatever answers rows and suites: a model that is loaded here, or one that a server runs.

Every answer is greedy. Losses need the model's own numbers for a given text, which no OpenAI-compatible server gives:
metrics and suites that read them are left out there (see `has_losses`). The responder of a server is in release/, which
starts llama.cpp; `ModelResponder` answers by the generation and the losses of every evaluation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol

from veneer.config import UserError
from veneer.data.batch import Batch, Example
from veneer.data.conversation import BadRowError, Conversation
from veneer.data.pipeline import HeldOut
from veneer.data.render import Renderer
from veneer.engine.interface import Engine, document_losses
from veneer.evaluation.generation import generate
from veneer.evaluation.memory import LESS_MEMORY, require_positions
from veneer.evaluation.partial import KeptAnswers
from veneer.machine.batching import Batching

Progress = Callable[[int], None]


class RowLosses(NamedTuple):
    """Summed loss (nats), trained tokens and UTF-8 bytes of each row, in the order of the rows."""

    losses: list[float]
    tokens: list[float]
    bytes: list[float]


class Responder(Protocol):
    """A model that answers conversations, and measures losses where it can.

    Attributes:
        has_losses: whether it measures losses.
        renderer: renderer in whose form right answers are; None: they are as rows have them.
    """

    @property
    def has_losses(self) -> bool: ...

    @property
    def renderer(self) -> Renderer | None: ...

    @property
    def is_chat(self) -> bool:
        """Whether a chat template is in use; else prompts are plain text."""

    def answer(
        self,
        asked: Sequence[Conversation],
        max_new_tokens: int,
        on_done: Progress = lambda done: None,
        kept: KeptAnswers | None = None,
    ) -> list[str]:
        """Answer conversations greedily, in their order; each ends with the turn to be answered.

        Args:
            asked: Conversations without their last answers.
            max_new_tokens: Longest answer.
            on_done: Callback that gets the number of answers just given.
            kept: Answers that an evaluation before this one left, which are not asked for again; it gets the others.
        """

    def losses(self, rows: Sequence[HeldOut]) -> RowLosses:
        """Measure the loss of each row; pieces of one document are one row. Only where `has_losses`."""

    def answer_losses(self, rows: Sequence[Conversation]) -> list[float]:
        """Measure the summed loss of the last answer of each conversation. Only where `has_losses`."""

    def without_system_prompt(self) -> "Responder":
        """Return the model as it answers without the system prompt of its run."""


class ModelResponder:
    """A model as it is at the moment: its adapter on, or off within `Engine.adapter_off`.

    Args:
        model: The Transformers or PEFT model.
        engine: The engine that runs it, for losses.
        renderer: Tokenizer and template of the model.
        batch_size: Rows at a time, fewer where memory is short.
    """

    has_losses = True

    def __init__(self, model: Any, engine: Engine, renderer: Renderer, batch_size: int | Batching) -> None:
        self.model, self.engine, self.renderer = model, engine, renderer
        self.batching = batch_size if isinstance(batch_size, Batching) else Batching(batch_size, LESS_MEMORY)

    @property
    def is_chat(self) -> bool:
        return self.renderer.is_chat

    def answer(
        self,
        asked: Sequence[Conversation],
        max_new_tokens: int,
        on_done: Progress = lambda done: None,
        kept: KeptAnswers | None = None,
    ) -> list[str]:
        prompts = [self.renderer.prompt_ids(row.messages, row.tools) for row in asked]
        parts = (self.model, self.renderer, prompts, max_new_tokens, self.batching)
        return generate(*parts, on_done=on_done, kept=kept)

    def losses(self, rows: Sequence[HeldOut]) -> RowLosses:
        ordered = sorted(rows, key=lambda row: -len(row.example.ids))  # the largest batches first
        losses = dict.fromkeys((row.conversation.place for row in rows), 0.0)
        tokens, text_bytes = losses.copy(), losses.copy()
        for row, loss in zip(ordered, self._losses([row.example for row in ordered]), strict=True):
            losses[row.conversation.place] += loss
            tokens[row.conversation.place] += row.example.weight
            text_bytes[row.conversation.place] += _bytes(self.renderer, row.example)
        return RowLosses([*losses.values()], [*tokens.values()], [*text_bytes.values()])

    def answer_losses(self, rows: Sequence[Conversation]) -> list[float]:
        examples = []
        for row, made in zip(rows, self.renderer.render(rows), strict=True):
            if isinstance(made, BadRowError):
                raise UserError(f"{row.place}: it cannot be rendered: {made}", "leave out what asks it")
            examples.append(made[0])
        order = sorted(range(len(examples)), key=lambda n: -len(examples[n].ids))
        losses = dict(zip(order, self._losses([examples[n] for n in order]), strict=True))
        return [losses[n] for n in range(len(examples))]

    def without_system_prompt(self) -> "ModelResponder":
        settings = self.renderer.settings.model_copy(update={"system_prompt": None})
        renderer = Renderer(self.renderer.tokenizer, settings)
        return ModelResponder(self.model, self.engine, renderer, self.batching)

    def _losses(self, examples: Sequence[Example]) -> list[float]:
        require_positions(self.model, [(example.place, len(example.ids)) for example in examples])
        of_batches = self.batching.over(examples, lambda some: document_losses(self.engine, Batch.of(some)))
        return list(chain.from_iterable(of_batches))


def _bytes(renderer: Renderer, example: Example) -> float:
    """Count the UTF-8 bytes of a row's trained text, weighted as its loss is; special tokens have none."""
    decode = partial(renderer.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return sum(weight * len(decode(example.ids[start:end]).encode()) for start, end, weight in example.spans)
