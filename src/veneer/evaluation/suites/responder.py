"""A loaded model that answers the items of suites, through the generation and the losses of every evaluation.

Items are asked without the run's system prompt: what is measured is the model beside its task. A base without a chat
template reads the prompt and a line break, and goes on.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Protocol

from veneer.config import UserError
from veneer.data.batch import Batch
from veneer.data.conversation import BadRowError, Conversation, Message
from veneer.data.render import Renderer
from veneer.engine.interface import Engine, document_losses
from veneer.evaluation.generation import generate
from veneer.evaluation.suites.suite import Item, Suite
from veneer.machine.batching import Batching


class Responder(Protocol):
    """Answers the items of a suite, in their order."""

    def answer(self, suite: Suite) -> list[str]: ...


class ModelResponder:
    """A model as it is at the moment: its adapter on, or off within `Engine.adapter_off`.

    Args:
        model: The Transformers or PEFT model.
        engine: The engine that runs it, for losses.
        renderer: Tokenizer and template; its system prompt is left out.
        batching: Rows at a time.
        on_done: Callback that gets the number of items just answered.
    """

    def __init__(
        self,
        model: Any,
        engine: Engine,
        renderer: Renderer,
        batching: Batching,
        on_done: Callable[[int], None] = lambda done: None,
    ) -> None:
        settings = renderer.settings.model_copy(update={"system_prompt": None})
        self._model, self._engine, self._batching, self._on_done = model, engine, batching, on_done
        self._renderer = Renderer(renderer.tokenizer, settings)

    def answer(self, suite: Suite) -> list[str]:
        """Generate answers greedily, or choose the likeliest, as the suite asks."""
        if suite.by_choice:
            return self._choose(suite.items)
        prompts = [self._renderer.prompt_ids([self._question(item)]) for item in suite.items]
        parts = (self._model, self._renderer, prompts, suite.max_new_tokens, self._batching)
        return generate(*parts, on_done=self._on_done)

    def _question(self, item: Item) -> Message:
        return Message("user", item["prompt"] + ("" if self._renderer.is_chat else "\n"))

    def _choose(self, items: Sequence[Item]) -> list[str]:
        """Return the choice of each item whose text, with the end of the turn, has the least loss."""
        chats = [
            Conversation((self._question(item), Message("assistant", choice)), item["prompt"])
            for item in items
            for choice in item["choices"]
        ]
        examples = []
        for made in self._renderer.render(chats):
            if isinstance(made, BadRowError):
                raise UserError(f"a question of a suite cannot be rendered: {made}", "leave that suite out")
            examples.append(made[0])
        order = sorted(range(len(examples)), key=lambda n: -len(examples[n].ids))
        batches = self._batching.over(order, lambda chosen: self._losses([examples[n] for n in chosen]))
        losses = dict(zip(order, chain.from_iterable(batches), strict=True))
        in_order = iter([losses[n] for n in range(len(examples))])
        answers = []
        for item in items:
            of_choices = [next(in_order) for _ in item["choices"]]
            answers.append(item["choices"][of_choices.index(min(of_choices))])
        self._on_done(len(items))
        return answers

    def _losses(self, examples: Sequence[Any]) -> list[float]:
        return document_losses(self._engine, Batch.of(examples))
