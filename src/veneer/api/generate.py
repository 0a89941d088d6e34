"""Answers of a run, an adapter or a base."""

from collections.abc import Callable, Sequence
from typing import Any

from veneer.api.load import load
from veneer.config import Data, Evaluate, Model, Run, UserError
from veneer.config.prompts import Question
from veneer.config.sampling import Sampling
from veneer.data import Message
from veneer.data.conversation import BadRowError
from veneer.data.turns import read_turns
from veneer.evaluation import generate as generate_answers
from veneer.evaluation.memory import Batching, rows_at_a_time
from veneer.planning.batch_shapes import Padded
from veneer.planning.target import this_device


def generate(
    name: str,
    prompts: Sequence[Question],
    system: str | None = None,
    compare_with_base: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 42,
    force: bool = False,
    *,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    base: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Answers to prompts: `prompt`, `answer`, and `base` where it is compared.

    Example:
        answers = veneer.generate("runs/tickets", prompts, compare_with_base=True, max_new_tokens=8)

    Args:
        name: As for `load`.
        prompts: Questions, or conversations as lists of turns (`{"role": ..., "content": ...}`).
        system: System prompt instead of the run's own, before prompts that have none.
        compare_with_base: Let the base answer too.
        max_new_tokens: Longest answer.
        temperature, top_p, top_k, repetition_penalty, stop, seed: See `veneer.config.sampling.Sampling`.
        force, base: As for `load`.
        on_text: Called with each piece of the answer as it is made; for a single prompt.

    Raises:
        UserError: Nothing of that name, a value out of range, or `compare_with_base` without an adapter.
    """
    import torch

    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, tuple(stop), seed)
    if on_text is not None and len(prompts) != 1:
        raise UserError(f"on_text with {len(prompts)} prompts: pieces of which answer?", "give a single prompt")
    target = this_device()
    loaded = load(name, force, base)
    if compare_with_base and loaded.origin is None:
        raise UserError(f"{name}: a base model alone, there is nothing to compare", "name a run's folder")
    ids = [loaded.renderer.prompt_ids(_turns(prompt, system)) for prompt in prompts]
    of_model = loaded.origin.model if loaded.origin is not None else Model(base=name)
    run = loaded.run or Run(model=of_model, data=Data(train="-"))
    run = run.model_copy(update={"evaluate": Evaluate(max_new_tokens=max_new_tokens)})
    batching = Batching(rows_at_a_time(run, Padded(len(ids), max(map(len, ids)), 1), target) if ids else 1)

    def answers(on_text: Callable[[str], None] | None = None) -> list[str]:
        torch.manual_seed(seed)
        parts = (loaded.model, loaded.renderer, ids, max_new_tokens, batching)
        return generate_answers(*parts, sampling=sampling, on_text=on_text)

    results: list[dict[str, Any]] = [
        {"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers(on_text), strict=True)
    ]
    if compare_with_base:
        with loaded.model.disable_adapter():
            for result, answer in zip(results, answers(), strict=True):
                result["base"] = answer
    return results


def _turns(prompt: Question, system: str | None) -> list[Message]:
    """A prompt as turns, with a system prompt before it where it has none."""
    try:
        turns = [Message("user", prompt)] if isinstance(prompt, str) else list(read_turns(prompt))
    except BadRowError as error:
        raise UserError(f"prompt: {error}", "write turns with role and content") from None
    if system is None or (turns and turns[0].role == "system"):
        return turns
    return [Message("system", system), *turns]
