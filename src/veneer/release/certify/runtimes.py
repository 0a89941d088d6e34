"""An artifact as its users will run it: messages in, an answer out, with what the certificate looks at.

A Transformers folder is run here, with its own tokenizer, template and generation settings and nothing of Veneer's;
servers.py asks an OpenAI-compatible server, and starts llama.cpp's for a GGUF file.

Each says which tokens it makes of a conversation and answers greedily, with the log-probabilities of the likeliest
tokens at every step. What a server does not report (the tokens of a prompt, say) is None, neither checked nor guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from veneer.config import JobError
from veneer.config.files import reading
from veneer.data import Message
from veneer.data.sandbox import Job, RefusedError, TemplateLimitError, shared
from veneer.evaluation.generation import contiguous_head_input
from veneer.evaluation.prefix import SharedPrefix, padded
from veneer.machine.device import Machine
from veneer.model.load import base_stop_ids
from veneer.model.quiet import quiet
from veneer.model.remote import read_config

TOP = 100  # likeliest tokens that are looked at; the rest is one bucket


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: As its user sees it.
        ids: Its tokens, without the one that ended it; None: the server does not report.
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
        """The tokens it makes of a conversation to be answered; None: it does not report."""
        ...

    def prompt_count(self, messages: Sequence[Message]) -> int | None:
        """How many tokens it counts in such a conversation; None: it does not report."""
        ...

    def answer(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        """Greedy answers."""
        ...

    def stop_ids(self) -> set[int] | None:
        """Tokens at which it ends an answer; None: it does not report."""
        ...


class Folder:
    """A folder in Transformers' format.

    Args:
        path: The folder.
        machine: Where it runs.
        batch: Prompts that are answered together.

    Raises:
        UserError: It holds no model that loads.
    """

    kind = "transformers"

    def __init__(self, path: Path, machine: Machine, batch: int = 16) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.path, self._batch = path, batch
        fix = "merge it again, or name what `veneer merge` wrote"
        with quiet(), reading(f"{path}: does not load in Transformers", fix):
            read_config(path, str(path))
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.model = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", device_map={"": machine.device}, trust_remote_code=False, use_safetensors=True
            ).eval()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int] | None:
        if not self.tokenizer.chat_template:
            ids = self.tokenizer("".join(message.content for message in messages))["input_ids"]
        else:
            job = Job([message.as_turn() for message in messages], (), [(len(messages), True)])
            source, special = self.tokenizer.get_chat_template(), dict(self.tokenizer.special_tokens_map)
            try:  # as apply_chat_template does it, within limits
                ((text,),) = shared().render(source, special, [job])
                if isinstance(text, RefusedError):
                    raise text
            except (RefusedError, TemplateLimitError) as error:
                why = f"its chat template fails, that of the training does not: {error}"
                raise JobError(f"{self.path}: {why}") from None
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    def prompt_count(self, messages: Sequence[Message]) -> int | None:
        return None  # the ids say more

    def answer(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        ids = [self.prompt_ids(messages) or [] for messages in prompts]
        return greedy(self.model, self.tokenizer, ids, max_new_tokens, self.stop_ids(), self._batch)

    def stop_ids(self) -> set[int]:
        return base_stop_ids(self.model.generation_config, "generation_config.json")


class _Likeliest:
    """Notes the likeliest tokens at each step of a generation, in place of the logits of the whole vocabulary."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[list[int]], list[list[float]]]] = []

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        top = scores_BV.float().log_softmax(-1).topk(min(TOP, scores_BV.shape[-1]))
        self.steps.append((top.indices.tolist(), top.values.tolist()))
        return scores_BV

    def of(self, row: int, count: int) -> list[dict[int, float]]:
        """Log-probabilities by id at the first steps of a row."""
        return [dict(zip(ids[row], values[row])) for ids, values in self.steps[:count]]


@torch.no_grad()
def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: set[int], batch: int = 16
) -> list[Answer]:
    """Greedy answers of a Transformers model to token ids, with the likeliest tokens at each step.

    Rows go together as they do in evaluation, shared beginnings and all, so that the same weights give the same
    answers: products over other shapes round otherwise.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    device = model.get_input_embeddings().weight.device
    answers: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    prefix = SharedPrefix(model, prompts)
    for chosen in (order[at : at + batch] for at in range(0, len(order), batch)):
        ids_BL, mask_BL = padded([prompts[n] for n in chosen], prefix.length, pad)
        likeliest = _Likeliest()
        with quiet(), contiguous_head_input(model):
            output_BL = model.generate(
                input_ids=ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([likeliest]),
                **prefix.repeated(len(chosen)),
            )
        new_BT = output_BL[:, ids_BL.shape[1] :].tolist()
        for row, n in enumerate(chosen):
            ends = [at for at, token in enumerate(new_BT[row]) if token in stop_ids]
            kept = new_BT[row][: ends[0]] if ends else new_BT[row]
            text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers[n] = Answer(text.strip(), kept, bool(ends), likeliest.of(row, len(kept) + bool(ends)))
    return [answer for answer in answers if answer is not None]
