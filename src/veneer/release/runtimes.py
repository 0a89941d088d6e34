"""An artifact as its users will run it: messages in, an answer out, with what the certificate looks at.

A Transformers folder is run here, with its own tokenizer, template and generation settings and nothing of Veneer's;
servers.py asks an OpenAI-compatible server, and starts llama.cpp's for a GGUF file.

Each says which tokens it makes of a conversation and answers greedily, with the log-probabilities of the likeliest
tokens at every step. What a server does not tell (the tokens of a prompt, say) is None and is not checked, not guessed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jinja2 import TemplateError

from veneer.config import JobError, UserError
from veneer.data import Message
from veneer.evaluate.generation import contiguous_head_input
from veneer.model.quiet import quiet
from veneer.plan.machine import Machine

TOP = 100  # likeliest tokens that are looked at; the rest is one bucket


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: As its user sees it.
        ids: Its tokens, without the one that ended it; None: the server does not tell.
        stopped: Whether it ended by itself, not at the limit.
        steps: At each of its tokens the log-probabilities of the likeliest tokens by id.
    """

    text: str
    ids: list[int] | None
    stopped: bool
    steps: list[dict[int, float]]


class Runtime(Protocol):
    """Something that runs an artifact."""

    kind: str

    def prompt_ids(self, messages: Sequence[Message]) -> list[int] | None:
        """The tokens it makes of a conversation to be answered; None: it does not tell."""
        ...

    def prompt_count(self, messages: Sequence[Message]) -> int | None:
        """How many tokens it counts in such a conversation; None: it does not tell."""
        ...

    def answer(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        """Greedy answers."""
        ...

    def stop_ids(self) -> set[int] | None:
        """Tokens at which it ends an answer; None: it does not tell."""
        ...


class Folder:
    """A folder in Transformers' format.

    Raises:
        UserError: It holds no model that loads.
    """

    kind = "transformers"

    def __init__(self, path: Path, machine: Machine) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.path = path
        with quiet():
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(path)
                self.model = AutoModelForCausalLM.from_pretrained(
                    path, dtype="auto", device_map={"": machine.device}
                ).eval()
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"{path}: does not load in Transformers: {reason}",
                    "merge it again, or name what `veneer merge` wrote",
                ) from None

    def prompt_ids(self, messages: Sequence[Message]) -> list[int] | None:
        if not self.tokenizer.chat_template:
            ids = self.tokenizer("".join(message.content for message in messages))["input_ids"]
        else:
            turns = [message.as_turn() for message in messages]
            try:
                made = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
            except TemplateError as error:
                why = f"its chat template fails, that of the training does not: {error}"
                raise JobError(f"{self.path}: {why}") from None
            ids = made["input_ids"]
        return list(ids)

    def prompt_count(self, messages: Sequence[Message]) -> int | None:
        return None  # the ids say more

    def answer(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        ids = [self.prompt_ids(messages) or [] for messages in prompts]
        return greedy(self.model, self.tokenizer, ids, max_new_tokens, self.stop_ids())

    def stop_ids(self) -> set[int]:
        named = self.model.generation_config.eos_token_id
        return set(named) if isinstance(named, list) else {named} - {None}


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: set[int], batch: int = 8
) -> list[Answer]:
    """Greedy answers of a Transformers model to token ids, with the likeliest tokens at each step."""
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=True,
    )
    device = model.get_input_embeddings().weight.device
    answers: list[Answer | None] = [None] * len(prompts)
    for chosen in _batches(prompts, batch):
        ids_BL, mask_BL = padded([prompts[n] for n in chosen], pad)
        with quiet(), contiguous_head_input(model):
            output = model.generate(
                input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), generation_config=config
            )
        tops = [logits_BV.float().log_softmax(-1).topk(min(TOP, logits_BV.shape[-1])) for logits_BV in output.logits]
        new_BT = output.sequences[:, ids_BL.shape[1] :].tolist()
        for row, n in enumerate(chosen):
            ends = [at for at, token in enumerate(new_BT[row]) if token in stop_ids]
            kept = new_BT[row][: ends[0]] if ends else new_BT[row]
            steps = [
                dict(zip(top.indices[row].tolist(), top.values[row].tolist())) for top in tops[: len(kept) + bool(ends)]
            ]
            text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers[n] = Answer(text.strip(), kept, bool(ends), steps)
    return [answer for answer in answers if answer is not None]


def _batches(prompts: Sequence[list[int]], most: int) -> Iterator[list[int]]:
    """Numbers of prompts that are answered together: of like length, so that little is padded."""
    chosen: list[int] = []
    for n in sorted(range(len(prompts)), key=lambda n: len(prompts[n])):
        if chosen and (len(chosen) == most or len(prompts[n]) > 1.5 * len(prompts[chosen[0]]) + 32):
            yield chosen
            chosen = []
        chosen.append(n)
    if chosen:
        yield chosen


def padded(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens padded on the left, and their mask; both int64 [rows, longest]."""
    longest = max(1, *(len(row) for row in rows))
    ids_BL = torch.full((len(rows), longest), pad)
    mask_BL = torch.zeros_like(ids_BL)
    for n, row in enumerate(rows):
        if row:
            ids_BL[n, longest - len(row) :] = torch.tensor(row)
            mask_BL[n, longest - len(row) :] = 1
    return ids_BL, mask_BL
