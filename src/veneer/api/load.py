"""Loads a run, an adapter or a base that then answers prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.config import Data, Evaluate, Model, Run, UserError
from veneer.config.names import find_adapter
from veneer.config.prompts import Question
from veneer.config.sampling import Sampling
from veneer.data.conversation import BadRowError, Message
from veneer.data.render import Renderer
from veneer.data.turns import read_turns
from veneer.evaluation.generation import generate as generate_answers
from veneer.evaluation.memory import LESS_MEMORY, rows_at_a_time
from veneer.machine.batching import Batching
from veneer.machine.device import find_machine
from veneer.machine.ranks import ALONE, Ranks
from veneer.model.load import load_model, load_tokenizer
from veneer.model.locate import locate
from veneer.model.tuned import TunedModel, find_tuned
from veneer.planning.batch_shapes import Padded
from veneer.planning.target import TargetDevice, this_device

GREEDY = Sampling()


@dataclass(frozen=True)
class LoadedModel:
    """A model that answers: `model("a question")`.

    Attributes:
        model: The Transformers or PEFT model.
        renderer: Tokenizer and template, as they were in training.
        base: The base's settings.
        target: The device as it was before the model was loaded.
        tuned: Source of its adapter and base; None: it is a base alone.
        ranks: This process among those that answer the same prompts together.
    """

    model: Any
    renderer: Renderer
    base: Model
    target: TargetDevice
    tuned: TunedModel | None = None
    ranks: Ranks = ALONE

    @property
    def run(self) -> Run | None:
        """The adapter's run, with the base that is loaded here; None: it is in no run's folder."""
        run = self.tuned.run if self.tuned is not None else None
        return run and run.model_copy(update={"model": self.base})

    def __call__(
        self,
        prompt: Question,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Answer one prompt; arguments as of `generate`, and `on_text` gets each piece of it as it is made."""
        return self.generate([prompt], system, max_new_tokens, sampling, on_text)[0]

    def generate(
        self,
        prompts: Sequence[Question],
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Answer prompts, in their order.

        Args:
            prompts: Questions, or conversations as lists of turns (`{"role": ..., "content": ...}`).
            system: System prompt instead of the run's own, before prompts that have none.
            max_new_tokens: Longest answer.
            sampling: Sampling settings, and the texts that end an answer.
            on_text: Callback that gets each piece of the answer as it is made; for a single prompt.

        Raises:
            UserError: A prompt is no conversation, or fills the model's positions.
        """
        if on_text is not None and len(prompts) != 1:
            raise UserError(f"on_text with {len(prompts)} prompts: it takes one answer", "give a single prompt")
        ids = [self.renderer.prompt_ids(_turns(prompt, system)) for prompt in prompts]
        run = self.run or Run(model=self.base, data=Data(train="-"))
        run = run.model_copy(update={"evaluate": Evaluate(max_new_tokens=max_new_tokens)})
        at_a_time = rows_at_a_time(run, Padded(len(ids), max(map(len, ids)), 1), self.target) if ids else 1
        batching = Batching(at_a_time, LESS_MEMORY, ranks=self.ranks)
        parts = (self.model, self.renderer, ids, max_new_tokens, batching)
        return generate_answers(*parts, sampling=sampling, on_text=on_text)


def load(name: str, force: bool = False, base: str | None = None) -> LoadedModel:
    """Load a run, one of its checkpoints or an adapter by its folder, or a base model by any name `model.base` takes.

    Example:
        model = veneer.load("runs/tickets")
        print(model("Which team? A question about my screen", max_new_tokens=8))

    Args:
        name: Name of the run, the checkpoint, the adapter or the model.
        force: Put the adapter on its base even where its passport says that it does not belong there.
        base: Another base than the adapter names.

    Raises:
        UserError: There is nothing of that name, the run has no adapter yet, or it does not belong to the base.
    """
    if find_adapter(name) is not None:
        return load_tuned(find_tuned(name, base, force))
    target = this_device()
    if base is not None:
        raise UserError(f"--base {base}: {name} is not an adapter, so --base does not apply", "leave it out")
    settings = Model(base=name)
    source = locate(settings)
    renderer = Renderer(load_tokenizer(source))
    return LoadedModel(load_model(source, settings, None, find_machine()), renderer, settings, target)


def load_tuned(tuned: TunedModel) -> LoadedModel:
    """Load an adapter that is found already, on its base."""
    target = this_device()
    renderer = tuned.renderer  # before the weights, which take longer to load
    if tuned.run is not None:
        target = target.within(tuned.run.train.memory_budget)
    return LoadedModel(tuned.load(), renderer, tuned.model, target, tuned)


def _turns(prompt: Question, system: str | None) -> list[Message]:
    """Return a prompt as turns, with a system prompt before it where it has none."""
    try:
        turns = [Message("user", prompt)] if isinstance(prompt, str) else list(read_turns(prompt))
    except BadRowError as error:
        raise UserError(f"prompt: {error}", "write turns with role and content") from None
    if system is None or (turns and turns[0].role == "system"):
        return turns
    return [Message("system", system), *turns]
