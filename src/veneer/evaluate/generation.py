"""Answers of a model to prompts, in batches of like length, stopping at the end-of-turn token.

Transformers owns generation. Prompts come as token ids from the one renderer that training uses, and are padded before
their own tokens with an explicit mask, so that a pad token that equals the end token does no harm. What all prompts
begin with is read once (prefix.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from veneer.data import Renderer
from veneer.evaluate.prefix import SharedPrefix, padded
from veneer.model.quiet import quiet


@torch.no_grad()
def generate(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    temperature: float = 0.0,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The model's answers, in the order of the prompts, without special tokens.

    Args:
        model: A Transformers or PEFT model.
        renderer: Renders for it; knows the stop tokens.
        prompts: Token ids of each prompt (`Renderer.prompt_ids`).
        max_new_tokens: Longest answer.
        batch_size: Prompts at a time.
        temperature: 0: the likeliest token each time; above: sampled.
        on_done: Called with the number of prompts just finished.
    """
    from transformers import GenerationConfig

    model.eval()
    tokenizer = renderer.tokenizer
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        # Said outright, or Transformers takes them from the base's own generation settings.
        repetition_penalty=1.0,
        top_p=1.0,
        top_k=0 if temperature else None,
        eos_token_id=sorted(renderer.stop_ids | _stop_ids(model)),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    device = model.get_input_embeddings().weight.device
    prefix = SharedPrefix(model, prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids_BL, mask_BL = padded([prompts[n] for n in chosen], prefix.length, tokenizer.pad_token_id)
        with quiet(), contiguous_head_input(model):
            output_BL = model.generate(
                input_ids=ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                generation_config=config,
                **prefix.repeated(len(chosen)),
            )
        longest = ids_BL.shape[1]
        for row, n in enumerate(chosen):
            text = tokenizer.decode(
                output_BL[row, longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            answers[n] = text.strip()
        on_done(len(chosen))
    return answers


def _stop_ids(model: Any) -> set[int]:
    """The stop tokens that the base's own generation settings name."""
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, list) else {ids} - {None}


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
