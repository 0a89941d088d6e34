"""Decoding: the settings of generation, texts that end an answer, and the text of an answer while it grows.

A text that ends an answer may begin and end within tokens, so it is looked for in the decoded end of the answer after
each token, and cut off behind. What is shown while an answer is made is never taken back: a beginning of such a text,
half a character and white space at the end wait for the next token.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from veneer.config.sampling import Sampling
from veneer.data.conversation import Conversation
from veneer.data.render import Renderer
from veneer.model.load import base_stop_ids

SLACK = 8  # tokens before a stop text that may decode to nothing, or to half a character


def generation_config(stop_ids: Iterable[int], pad_id: int, max_new_tokens: int, sampling: Sampling) -> Any:
    """Make Transformers' GenerationConfig; each field is set, or it would come from the model's own settings."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # what is sampled, SampledTokens draws
        temperature=None,
        repetition_penalty=sampling.repetition_penalty,
        top_p=1.0,
        top_k=None,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )


def answer_text(tokenizer: Any, ids: Any, stop: Sequence[str] = ()) -> str:
    """Decode an answer's tokens: without special tokens, and up to the first stop text."""
    return _cut(_decode(tokenizer, ids), stop).strip()


def expected_answer(renderer: Renderer, conversation: Conversation) -> str:
    """Return the answer that the model is to give to a row's last question.

    Raises:
        UserError: The row cannot be rendered.
    """
    return answer_text(renderer.tokenizer, renderer.answer_ids(conversation))


class StopAtText:
    """A stopping criterion of Transformers: rows whose answer holds one of the texts are finished.

    Args:
        tokenizer: Tokenizer that decodes.
        texts: Texts that end an answer.
        start: Tokens before the answer.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int) -> None:
        self._tokenizer, self._texts, self._start = tokenizer, texts, start
        # A token stands for a byte at least.
        self._tail = SLACK + max(len(text.encode()) for text in texts)

    def __call__(self, ids_BL: torch.Tensor, scores: Any, **given: Any) -> torch.Tensor:
        found = [self.is_ended(ids) for ids in ids_BL[:, self._start :].tolist()]
        return torch.tensor(found, device=ids_BL.device)

    def is_ended(self, ids: Sequence[int]) -> bool:
        """Return whether the end of an answer holds one of the texts."""
        end = self._tokenizer.decode(ids[-self._tail :], clean_up_tokenization_spaces=False)
        return any(text in end for text in self._texts)


class LikeliestTokens:
    """A logits processor of Transformers that changes nothing: it notes the likeliest tokens at each step.

    Args:
        count: Number of tokens to record.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._steps: list[tuple[list[list[int]], list[list[float]]]] = []

    def __call__(self, ids_BL: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        top = scores_BV.float().log_softmax(-1).topk(min(self._count, scores_BV.shape[-1]))
        self._steps.append((top.indices.tolist(), top.values.tolist()))
        return scores_BV

    def of(self, row: int) -> list[dict[int, float]]:
        """Return log-probabilities by id at each step of a row."""
        return [dict(zip(ids[row], values[row])) for ids, values in self._steps]


class SampledTokens:
    """A logits processor of Transformers that draws each row's next token by that row's own random numbers.

    Transformers draws for all rows of a batch from one generator, so that an answer would depend on the rows beside it.
    Here a row's token is the one at which the cumulated probability passes the row's next uniform number, and all other
    tokens are ruled out.

    Args:
        sampling: Settings, with a temperature above 0.
        seeds: Seed of each row of the batch; see `row_seeds`.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self._choice = TokenChoice(sampling)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, ids_BL: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        drawn_B = torch.cat([torch.rand(1, generator=generator) for generator in self._generators])
        chosen_B = self._choice(scores_BV, drawn_B.to(scores_BV.device))
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)


class TokenChoice:
    """Chooses each row's next token: the likeliest, or at a temperature the one that a uniform number falls on.

    Args:
        sampling: Settings; a repetition penalty is not among what is heeded here.
    """

    def __init__(self, sampling: Sampling) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._warpers: list[Any] = []
        if sampling.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, scores_BV: torch.Tensor, drawn_B: torch.Tensor | None) -> torch.Tensor:
        """Return a token for each row of scores; `drawn_B`, uniform numbers, is None for the likeliest."""
        scores_BV = scores_BV.float()
        if drawn_B is None:
            return scores_BV.argmax(-1)
        for warp in self._warpers:
            scores_BV = warp(None, scores_BV)
        cumulated_BV = scores_BV.softmax(-1).cumsum(-1)
        passed_B = drawn_B * cumulated_BV[:, -1]  # the sum is 1 but for rounding
        chosen_B1 = torch.searchsorted(cumulated_BV, passed_B[:, None], right=True)
        return chosen_B1[:, 0].clamp_(max=cumulated_BV.shape[-1] - 1)


def row_seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """Return a seed for each prompt, by its tokens and how often they came before: order and batch do not matter."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in map(tuple, prompts):
        text = f"{seed} {seen[prompt]} {prompt}"
        found.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
        seen[prompt] += 1
    return found


def draws_of(prompts: Sequence[Sequence[int]], room: Sequence[int], sampling: Sampling) -> list[torch.Tensor | None]:
    """Return each row's uniform numbers, one a token of its answer; None each: greedy."""
    if sampling.temperature == 0:
        return [None] * len(prompts)
    seeds = row_seeds(prompts, sampling.seed)
    return [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for count, seed in zip(room, seeds)]


class TextStream:
    """A streamer of Transformers: gives the text of one answer as it grows; joined, the pieces are `answer_text`.

    Args:
        tokenizer: Tokenizer that decodes.
        stop: Texts that end the answer.
        on_text: Callback that gets each piece.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._stop, self._on_text = tokenizer, stop, on_text
        self._ids: list[int] | None = None
        self._shown = 0

    def put(self, ids: torch.Tensor) -> None:
        """Take the prompt first, then each token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.flatten().tolist()
        text = _decode(self._tokenizer, self._ids)
        kept = _cut(text, self._stop)
        if kept == text:
            kept = _without_begun(text.rstrip("\ufffd"), self._stop)
        self._show(kept.strip())

    def end(self) -> None:
        """Give what is left."""
        self._show(answer_text(self._tokenizer, self._ids or [], self._stop))

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)


def _decode(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def _without_begun(text: str, stop: Sequence[str]) -> str:
    """Cut from the end of a text what may become a stop text."""
    begun = (size for word in stop for size in range(1, len(word)) if text.endswith(word[:size]))
    return text[: len(text) - max(begun, default=0)]


def stop_ids_of(model: Any, renderer: Renderer) -> list[int]:
    """Return the tokens that end an answer: those of the renderer and of the base's generation settings."""
    return sorted(renderer.stop_ids | base_stop_ids(model.generation_config, "generation_config.json"))
