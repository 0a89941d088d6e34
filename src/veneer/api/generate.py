"""Generates answers of a run, an adapter or a base."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from veneer.api.load import load
from veneer.config import UserError
from veneer.config.prompts import Question
from veneer.config.sampling import Sampling
from veneer.machine.ranks import join_ranks
from veneer.model.attach import adapter_off


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
    """Answer prompts; each result has `prompt`, `answer`, and `base` where it is compared.

    Example:
        answers = veneer.generate("runs/tickets", prompts, compare_with_base=True, max_new_tokens=8)

    Args:
        name: Name as for `load`.
        prompts: Questions, or conversations as lists of turns (`{"role": ..., "content": ...}`).
        system: System prompt instead of the run's own, before prompts that have none.
        compare_with_base: Let the base answer too.
        max_new_tokens: Longest answer.
        temperature, top_p, top_k, repetition_penalty, stop, seed: See `veneer.config.sampling.Sampling`.
        force, base: arguments of `load`.
        on_text: Callback that gets each piece of the answer as it is made; for a single prompt.

    Raises:
        UserError: Nothing of that name, a value out of range, or `compare_with_base` without an adapter.
    """
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, tuple(stop), seed)
    ranks = join_ranks()
    model = replace(load(name, force, base), ranks=ranks)
    if compare_with_base and model.tuned is None:
        raise UserError(f"{name}: this is a base model, so there is nothing to compare", "name a run's folder")
    answers = model.generate(prompts, system, max_new_tokens, sampling, on_text)
    found: list[dict[str, Any]] = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers)]
    if compare_with_base:
        with adapter_off(model.model):
            for row, answer in zip(found, model.generate(prompts, system, max_new_tokens, sampling), strict=True):
                row["base"] = answer
    return found
