"""How each row's next token is chosen: rows of different settings in one batch, none of which depends on another.

A row draws by uniform numbers of its own, and takes the token at which the cumulated probability passes the number, as
`veneer generate` does; so a seed means the same there and here. Temperature, top_k and top_p are Transformers'; min_p
(arXiv 2407.01082) keeps tokens of at least that share of the likeliest one's probability; frequency and presence
penalties are OpenAI's, over the tokens of the answer; a repetition penalty is Transformers', over prompt and answer.
Log-probabilities are those of the model, before temperature and filters.

B rows, V tokens of the vocabulary.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Decoding:
    """How the tokens of an answer are chosen.

    Attributes:
        temperature: 0: the likeliest token each time.
        top_p, top_k, min_p: Limits of what is sampled from; 1, 0 and 0: all tokens.
        frequency_penalty, presence_penalty: Taken from the logit of a token for each time, or once, that the answer
            has it.
        repetition_penalty: Divides positive logits of tokens in prompt and answer, and multiplies negative ones.
        logit_bias: Added to the logits of tokens.
        seed: Seed of the uniform numbers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def changes_logits(self) -> bool:
        """Whether logits change before a token is chosen."""
        penalties = self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias)


class Choice(NamedTuple):
    """A token that was chosen, its log-probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    likeliest: Sequence[tuple[int, float]]


class Row(NamedTuple):
    """A row of logits: its settings, the tokens so far, its random numbers, and a mask of its grammar.

    Attributes:
        likeliest: Number of likeliest tokens to return; None: no log-probabilities.
        allowed: Packed bits of the tokens that a grammar allows, int32 [V / 32]; None: all.
    """

    decoding: Decoding
    prompt: Sequence[int]
    answer: Sequence[int]
    generator: torch.Generator
    likeliest: int | None = None
    allowed: torch.Tensor | None = None


def seed_of(prompt: Sequence[int], seed: int) -> int:
    """Return the seed of a prompt's random numbers, as `veneer generate` has it for the first such prompt."""
    text = f"{seed} 0 {tuple(prompt)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@torch.no_grad()
def choose(logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[Choice]:
    """Choose each row's next token; logits in any float dtype, which are not changed."""
    noted = _likeliest(logits_BV, rows)
    if any(row.decoding.changes_logits or row.allowed is not None for row in rows):
        logits_BV = logits_BV.float().clone()
        for number, row in enumerate(rows):
            _change(logits_BV[number], row)
    chosen_B = logits_BV.argmax(-1)
    if drawn := [number for number, row in enumerate(rows) if row.decoding.temperature > 0]:
        index = torch.tensor(drawn, device=logits_BV.device)
        chosen_B[index] = _drawn(logits_BV[index].float(), [rows[number] for number in drawn])
    tokens = chosen_B.tolist()
    return [_choice(token, note) for token, note in zip(tokens, noted, strict=True)]


def _choice(token: int, note: tuple[torch.Tensor, list[tuple[int, float]]] | None) -> Choice:
    if note is None:
        return Choice(token, 0.0, ())
    logprobs_V, likeliest = note
    return Choice(token, float(logprobs_V[token]), likeliest)


def _likeliest(
    logits_BV: torch.Tensor, rows: Sequence[Row]
) -> list[tuple[torch.Tensor, list[tuple[int, float]]] | None]:
    """Return log-probabilities and the likeliest tokens of the rows that ask for them."""
    asking = [number for number, row in enumerate(rows) if row.likeliest is not None]
    found: list[Any] = [None] * len(rows)
    if asking:
        logprobs_BV = logits_BV[torch.tensor(asking, device=logits_BV.device)].float().log_softmax(-1)
        most = max(1, *(rows[number].likeliest or 0 for number in asking))
        top = logprobs_BV.topk(min(most, logprobs_BV.shape[-1]))
        ids, values, host_BV = top.indices.tolist(), top.values.tolist(), logprobs_BV.cpu()
        for at, number in enumerate(asking):
            count = rows[number].likeliest or 0
            found[number] = host_BV[at], list(zip(ids[at], values[at]))[:count]
    return found


def _change(logits_V: torch.Tensor, row: Row) -> None:
    """Apply penalties, biases and the grammar to one row, in place."""
    decoding, device = row.decoding, logits_V.device
    if decoding.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt, *row.answer}), device=device)
        values = logits_V[seen]
        penalty = decoding.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.answer and (decoding.frequency_penalty or decoding.presence_penalty):
        counts = Counter(row.answer)
        tokens = torch.tensor(list(counts), device=device)
        times = torch.tensor(list(counts.values()), device=device, dtype=logits_V.dtype)
        logits_V[tokens] -= decoding.frequency_penalty * times + decoding.presence_penalty
    if decoding.logit_bias:
        tokens = torch.tensor(list(decoding.logit_bias), device=device)
        logits_V[tokens] += torch.tensor(list(decoding.logit_bias.values()), device=device, dtype=logits_V.dtype)
    if row.allowed is not None:
        logits_V.masked_fill_(~_bits(row.allowed, len(logits_V)).to(device), -torch.inf)


def _bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first bits of int32 words, the lowest of each word first; bool [count]."""
    shifts = torch.arange(32, dtype=torch.int32)
    bits = ((packed[:, None] >> shifts) & 1).bool().flatten()
    allowed = torch.zeros(count, dtype=torch.bool)
    allowed[: len(bits)] = bits[:count]
    return allowed


def _drawn(logits_BV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Draw a token for each row, by its temperature, its filters and its next uniform number."""
    device = logits_BV.device

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=torch.float32)[:, None]

    settings = [row.decoding for row in rows]
    logits_BV = logits_BV / column([one.temperature for one in settings])
    if any(one.top_k or one.top_p < 1 for one in settings):
        sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
        rank_V = torch.arange(logits_BV.shape[-1], device=device)
        most_B1 = torch.tensor([one.top_k or len(rank_V) for one in settings], device=device)[:, None]
        sorted_BV = sorted_BV.masked_fill(rank_V >= most_B1, -torch.inf)
        before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)
        is_out_BV = before_BV >= column([one.top_p for one in settings])
        is_out_BV &= column([one.top_p for one in settings]) < 1
        is_out_BV[:, 0] = False
        sorted_BV = sorted_BV.masked_fill(is_out_BV, -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter_(1, order_BV, sorted_BV)
    probabilities_BV = logits_BV.softmax(-1)
    if any(one.min_p > 0 for one in settings):
        least_B1 = column([one.min_p for one in settings]) * probabilities_BV.amax(-1, keepdim=True)
        probabilities_BV = probabilities_BV.masked_fill(probabilities_BV < least_B1, 0.0)
    cumulated_BV = probabilities_BV.cumsum(-1)
    drawn_B1 = torch.cat([torch.rand(1, generator=row.generator) for row in rows]).to(device)[:, None]
    chosen_B1 = torch.searchsorted(cumulated_BV, drawn_B1 * cumulated_BV[:, -1:], right=True)
    # The number may fall on the sum itself by rounding; the last token that has a probability is meant then.
    last_B1 = (probabilities_BV > 0).int().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(chosen_B1, last_B1)[:, 0]
