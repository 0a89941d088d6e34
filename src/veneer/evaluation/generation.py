"""A model answers prompts, and stops at the end-of-turn token.

Prompts come as token ids from the one renderer that training uses; what all begin with is read once (prefix.py). They
are answered in slots (slots.py) where the model's cache allows it (slot_cache.py). Otherwise, and for what only
Transformers' own generation gives (text while it is made, log-probabilities, a repetition penalty), in batches of
similar length through `generate`, padded before their own tokens with an explicit mask, so that a pad token that
equals the end token does no harm.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from veneer.config.sampling import Sampling
from veneer.data.render import Renderer
from veneer.evaluation.decoding import (
    LikeliestTokens,
    SampledTokens,
    StopAtText,
    TextStream,
    TokenChoice,
    answer_text,
    draws_of,
    generation_config,
    row_seeds,
)
from veneer.evaluation.decoding import stop_ids_of as stop_ids_of
from veneer.evaluation.memory import LESS_MEMORY, alike, room_for_answers
from veneer.evaluation.partial import KeptAnswers
from veneer.evaluation.prefix import SharedPrefix, padded
from veneer.machine.batching import Batching
from veneer.model.adapters.dora import norms_kept
from veneer.model.dense import adapter_in_copies
from veneer.model.quiet import quiet

GREEDY = Sampling()


class Continuation(NamedTuple):
    """The tokens that a model generates after a prompt.

    Attributes:
        ids: New tokens; after the one that ends the answer only padding may follow.
        steps: Log-probabilities of the likeliest tokens by id at each new token; empty: not asked for.
    """

    ids: list[int]
    steps: list[dict[int, float]]


def generate(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int | Batching = 16,
    sampling: Sampling = GREEDY,
    on_done: Callable[[int], None] = lambda done: None,
    on_text: Callable[[str], None] | None = None,
    kept: KeptAnswers | None = None,
) -> list[str]:
    """Generate answers, in the order of the prompts, without special tokens.

    Args:
        model: A Transformers or PEFT model.
        renderer: Tokenizer, template and stop tokens of the model.
        prompts: Token ids of each prompt (`Renderer.prompt_ids`).
        max_new_tokens: Longest answer; a prompt near the end of the model's positions gets no longer one than these
            have room for.
        batch_size: Prompts at a time, fewer where memory is short.
        sampling: Sampling settings, and the texts that end an answer.
        on_done: Callback that gets the number of prompts just finished.
        on_text: Callback that gets each piece of the answer as it is made; for a single prompt.
        kept: Answers that an evaluation before this one left, which are not generated again; it gets the others.

    Raises:
        UserError: A prompt fills the model's positions.
        JobError: Not even one prompt at a time fits into memory.
    """
    tokenizer = renderer.tokenizer
    config = generation_config(stop_ids_of(model, renderer), tokenizer.pad_token_id, max_new_tokens, sampling)
    room = room_for_answers(model, prompts, max_new_tokens)
    parts = (model, tokenizer, prompts, config, batch_size, room)
    found = continue_prompts(*parts, sampling=sampling, on_done=on_done, on_text=on_text, kept=kept)
    return [answer_text(tokenizer, ids, sampling.stop) for ids, _ in found]


@torch.no_grad()
def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    config: Any,
    batch_size: int | Batching,
    room: Sequence[int] | None = None,
    *,
    likeliest: int = 0,
    sampling: Sampling = GREEDY,
    on_done: Callable[[int], None] = lambda done: None,
    on_text: Callable[[str], None] | None = None,
    kept: KeptAnswers | None = None,
) -> list[Continuation]:
    """Generate the tokens that follow each prompt: the one door to generation for all models.

    Rows go together by their length, and what all begin with is read once, so that the same weights give the same
    answers wherever they are asked: products over other shapes round otherwise.

    Args:
        model, tokenizer, prompts, on_done, on_text, kept: arguments of `generate`.
        config: Transformers' GenerationConfig.
        batch_size: Prompts at a time, fewer where memory is short.
        room: Longest answer to each prompt; None: as the configuration says.
        likeliest: Number of the likeliest tokens to record at each step.
        sampling: Sampling settings, and the texts that end an answer; each row draws by a seed of its own.

    Raises:
        JobError: Not even one prompt at a time fits into memory.
    """
    model.eval()
    found: list[Continuation] = [Continuation([], [])] * len(prompts)
    batching = batch_size if isinstance(batch_size, Batching) else Batching(batch_size, LESS_MEMORY)
    stop, seeds = sampling.stop, row_seeds(prompts, sampling.seed)
    room = room or [config.max_new_tokens] * len(prompts)
    device = model.get_input_embeddings().weight.device
    wants_more = likeliest or on_text is not None or sampling.repetition_penalty != 1
    if len(prompts) > 1 and not wants_more and _has_slots(model):
        parts = (model, tokenizer, prompts, config.eos_token_id, batching, room)
        for number, ids in _answers_in_slots(*parts, sampling, kept, on_done).items():
            found[number] = Continuation(ids, [])
        return found

    def answer(chosen: Sequence[int]) -> dict[int, Continuation]:
        if kept is not None and kept.holds(chosen):
            return {n: Continuation(kept.known[n], []) for n in chosen}
        ids_BL, mask_BL = padded([prompts[n] for n in chosen], prefix.length, config.pad_token_id)
        longest = ids_BL.shape[1]
        noted = LikeliestTokens(likeliest)
        processors: list[Any] = [noted] if likeliest else []
        if sampling.temperature > 0:
            processors.append(SampledTokens(sampling, [seeds[n] for n in chosen]))
        with quiet(), contiguous_head_input(model):
            output_BL = model.generate(
                input_ids=ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                generation_config=config,
                logits_processor=processors or None,
                stopping_criteria=[StopAtText(tokenizer, stop, longest)] if stop else None,
                streamer=TextStream(tokenizer, stop, on_text) if on_text is not None else None,
                **prefix.repeated(len(chosen)),
            )
        answers = {n: Continuation(output_BL[row, longest:].tolist(), noted.of(row)) for row, n in enumerate(chosen)}
        if kept is not None:
            kept.keep({n: ids for n, (ids, _) in answers.items()})
        return answers

    with adapter_in_copies(model), norms_kept(model):
        prefix = SharedPrefix(model, prompts)
        for tokens, numbers in alike(room, [len(prompt) for prompt in prompts]):
            config.max_new_tokens = tokens
            for answers in batching.over(numbers, answer):
                for n, continuation in answers.items():
                    found[n] = continuation
                on_done(len(answers))
    return found


def _has_slots(model: Any) -> bool:
    from veneer.evaluation.slot_cache import has_slots  # here, since it imports Transformers

    return has_slots(model)


def _answers_in_slots(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int] | None,
    batching: Batching,
    room: Sequence[int],
    sampling: Sampling,
    kept: KeptAnswers | None,
    on_done: Callable[[int], None],
) -> dict[int, list[int]]:
    """Return the tokens of each answer by the number of its prompt; arguments of `continue_prompts`."""
    from veneer.evaluation.prefill import not_own, read_prompts
    from veneer.evaluation.slots import Row, SlotDecoder

    found = {} if kept is None else {n: ids for n, ids in kept.known.items() if n < len(prompts)}
    draws = draws_of(prompts, room, sampling)
    rows = [Row(*row) for row in zip(prompts, room, draws, strict=True)]
    is_ended = StopAtText(tokenizer, sampling.stop, 0).is_ended if sampling.stop else None
    ranks = batching.ranks
    known = {*found, *not_own(prompts, min(batching.agree(), len(prompts)), ranks)}
    own: dict[int, list[int]] = {}

    def answer(slots: int) -> Iterator[dict[int, list[int]]]:
        decoder = SlotDecoder(model, rows, slots, stop_ids or [], TokenChoice(sampling), is_ended)
        for answers in decoder.answers(read_prompts(model, prefix, prompts, known, slots)):
            own.update(answers)
            known.update(answers)
            yield answers

    if found:
        on_done(len(found))
    told = len(found)
    if len(known) < len(prompts):
        with adapter_in_copies(model), norms_kept(model), quiet(), contiguous_head_input(model):
            prefix = SharedPrefix(model, prompts)
            for answers in batching.until_done(answer, len(prompts)):
                if kept is not None:
                    kept.keep(answers)
                told += len(answers)
                on_done(len(answers))
    for answers in ranks.gather(own):
        found.update(answers)
    if told < len(prompts):
        on_done(len(prompts) - told)  # those of other ranks
    batching.agree()
    return found


@contextmanager
def contiguous_head_input(model: Any) -> Iterator[None]:
    """Hand the head a contiguous tensor.

    After the prompt Transformers passes it a slice (the last position of each row), for which torch on the CPU
    copies the head's whole weight once a row: 1.3 GB and two seconds for 24 rows of a 135M model.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
