"""Runs an artifact as its users will: messages in, an answer out, with the numbers that the certificate checks.

A Transformers folder is run here, with its own tokenizer, template and generation settings and nothing of Veneer's;
servers.py asks an OpenAI-compatible server, and starts llama.cpp's for a GGUF file.

Each says which tokens it makes of a conversation and answers greedily, with the log-probabilities of the likeliest
tokens at every step. What a server does not report (the tokens of a prompt, say) is None, neither checked nor guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from veneer.config import JobError
from veneer.config.files import reading
from veneer.data.conversation import Message
from veneer.data.sandbox import Job, RefusedError, TemplateLimitError, shared
from veneer.evaluation.decoding import answer_text, generation_config
from veneer.evaluation.generation import GREEDY, continue_prompts
from veneer.machine.device import Machine
from veneer.model.load import base_stop_ids
from veneer.model.quiet import quiet
from veneer.model.remote import read_config

TOP = 100  # likeliest tokens that are looked at; the rest is one bucket


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: Text as a user sees it.
        ids: Tokens, without the one that ended it; None: the server does not report them.
        stopped: Whether it ended by itself, not at the limit.
        steps: Log-probabilities of the likeliest tokens by id, for each token of the answer.
    """

    text: str
    ids: list[int] | None
    stopped: bool
    steps: list[dict[int, float]]


class Runtime(Protocol):
    """Something that runs an artifact."""

    kind: str

    def prompt_ids(self, messages: Sequence[Message]) -> list[int] | None:
        """Return the runtime's tokens of a conversation to be answered; None: it does not report them."""
        ...

    def prompt_count(self, messages: Sequence[Message]) -> int | None:
        """Return the runtime's count of tokens in such a conversation; None: it does not report it."""
        ...

    def answer(self, prompts: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Answer]:
        """Answer greedily."""
        ...

    def stop_ids(self) -> set[int] | None:
        """Return the tokens at which it ends an answer; None: it does not report them."""
        ...


class Folder:
    """A folder in Transformers' format.

    Args:
        path: The folder.
        machine: Device that runs it.
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


def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: set[int], batch: int = 16
) -> list[Answer]:
    """Generate greedy answers of a Transformers model to token ids, with the likeliest tokens at each step."""
    config = generation_config(stop_ids, tokenizer.pad_token_id or 0, max_new_tokens, GREEDY)
    answers = []
    for ids, steps in continue_prompts(model, tokenizer, prompts, config, batch, likeliest=TOP):
        end = next((at for at, token in enumerate(ids) if token in stop_ids), None)
        kept, stopped = ids[:end], end is not None
        answers.append(Answer(answer_text(tokenizer, kept), kept, stopped, steps[: len(kept) + stopped]))
    return answers
