"""Compares the next tokens of an artifact with the judged model's, where the lead exceeds rounding.

The judged model reads the artifact's answers in one pass, so both sides see the same text at every position. Two
measures:

    divergence    KL of the next token, judged model against artifact; the artifact names its likeliest tokens, all
                  others are one bucket, so what is computed is at most the true divergence
    agreement     how often the artifact takes the token that the judged model finds likeliest

Two runtimes add numbers in different orders, and so does one runtime in batches of different shapes. A token that leads
by less than that can move is decided by rounding, and says nothing. So the noise of both sides is measured (the same
model twice on the same prompts), and only tokens that lead by more count: by `TIE_NATS`, the resolution of
logits in the judged model's precision, and the noise of both.

Fixed text that every answer has (the keys of a JSON object, say) is never in doubt and would make any artifact
agree. Where enough tokens are a choice, only those count, and with them every token on which the two differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from veneer.config.results import Check
from veneer.data.render import Renderer
from veneer.release.certify.prompts import Prompt
from veneer.release.certify.runtimes import Answer

TIE_NATS = 0.05  # a lead of so little is no choice of the model's
SURE = 0.99  # probability from which a token is fixed text
ENOUGH = 50  # tokens that are a choice; with fewer, all that count are taken


@dataclass(frozen=True)
class Tolerance:
    """The allowed distance of an artifact of a precision from the judged model.

    Attributes:
        divergence: Mean KL divergence of the next token, nats.
        agreement: Least share of the counted tokens that are the judged model's.
    """

    divergence: float
    agreement: float

    def at_least(self, other: "Tolerance") -> "Tolerance":
        """Return the wider limits of the two."""
        return Tolerance(max(self.divergence, other.divergence), min(self.agreement, other.agreement))


LIMITS = {
    **{
        "float32": Tolerance(0.01, 0.97),
        "bfloat16": Tolerance(0.02, 0.95),
        "float16": Tolerance(0.02, 0.95),
    },
    **{
        "f32": Tolerance(0.02, 0.95),
        "f16": Tolerance(0.02, 0.95),
        "bf16": Tolerance(0.02, 0.95),
        "q8_0": Tolerance(0.03, 0.93),
    },
    **{
        "q6_k": Tolerance(0.05, 0.9),
        "q5_k_m": Tolerance(0.08, 0.87),
        "q5_k_s": Tolerance(0.08, 0.87),
    },
    **{"q4_k_m": Tolerance(0.2, 0.75), "q4_k_s": Tolerance(0.2, 0.75), "q4_0": Tolerance(0.3, 0.7)},
    **{
        "q3_k_l": Tolerance(0.5, 0.6),
        "q3_k_m": Tolerance(0.5, 0.6),
        "q3_k_s": Tolerance(0.7, 0.55),
        "q2_k": Tolerance(1.5, 0.4),
    },
    "endpoint": Tolerance(0.2, 0.75),
}
OTHER_BASE = Tolerance(0.2, 0.75)  # merged into other weights than were judged, by choice: as far as 4 bits may move it


@dataclass(frozen=True)
class Noise:
    """The change of a token's lead between two runs of the same model, nats.

    Attributes:
        judged, artifact: values of each side.
    """

    judged: float
    artifact: float

    @property
    def total(self) -> float:
        return self.judged + self.artifact


def noise_between(one: Sequence[Answer], other: Sequence[Answer]) -> float:
    """Measure how far the lead of the likeliest token moves between two runs, at 95% of the positions they share.

    Not the largest: a few tokens in twenty may be decided by rounding, which the limits of agreement leave room for.
    """
    moves = [0.0]
    for first, second in zip(one, other, strict=True):
        for at, (before, after) in enumerate(zip(first.steps, second.steps)):
            top = sorted(before, key=lambda number: -before[number])[:2]
            if len(top) == 2 and all(number in after for number in top):
                moves.append(abs((before[top[0]] - before[top[1]]) - (after[top[0]] - after[top[1]])))
            if (first.ids or [])[at : at + 1] != (second.ids or [])[at : at + 1]:
                break  # from here on they read other texts
    finite = [move for move in moves if math.isfinite(move)]
    return float(np.quantile(finite, 0.95))


@dataclass(frozen=True)
class Measured:
    """Measurements along one answer.

    Attributes:
        divergences: KL at each position, nats.
        same, choices, same_choices: Tokens that count and are the same; those that are a choice; of these the same.
        counted: Tokens whose lead is larger than rounding explains.
        finite: Whether the artifact's numbers are.
    """

    divergences: list[float]
    counted: int
    same: int
    choices: int
    same_choices: int
    finite: bool


@torch.no_grad()
def measure(
    model: Any, renderer: Renderer, prompt: Prompt, answer: Answer, ends: set[int], noise: float = 0.0
) -> Measured:
    """Compare the judged model's distributions along the artifact's answer with the artifact's.

    Args:
        model: The judged model.
        renderer: Tokenizer of that model.
        prompt, answer: the question, and the artifact's answer.
        ends: Tokens at which an answer ends.
        noise: Sum of both sides' noise, nats.
    """
    ids = answer.ids
    if ids is None:
        ids = list(renderer.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
    logits_TV = read(model, prompt.ids, ids)
    margins = TIE_NATS + noise + 2 * torch.finfo(logits_TV.dtype).eps * logits_TV.max(-1).values.abs().float()
    expected_TV = logits_TV.float().log_softmax(-1).cpu()
    top_T2 = expected_TV.topk(2).values
    counted = (top_T2[:, 0] - top_T2[:, 1] > margins.cpu()).tolist()
    sure = (top_T2[:, 0].exp() >= SURE).tolist()
    chosen = expected_TV.argmax(-1).tolist()
    same = [chosen[at] == number for at, number in enumerate(ids)]
    if answer.stopped:
        same.append(chosen[len(ids)] in ends)
    decided = [at for at in range(len(same)) if counted[at]]
    choices = [at for at in decided if not sure[at] or not same[at]]
    values = [divergence(expected_TV[at], step) for at, step in enumerate(answer.steps[: len(ids) + 1])]
    return Measured(
        divergences=[value for value in values if math.isfinite(value)],
        counted=len(decided),
        same=sum(same[at] for at in decided),
        choices=len(choices),
        same_choices=sum(same[at] for at in choices),
        finite=all(math.isfinite(value) for value in values),
    )


@torch.no_grad()
def read(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Return logits at each position of an answer and behind it, [answer + 1, vocabulary], in the model's precision."""
    row = torch.tensor([[*prompt, *ids]], device=model.get_input_embeddings().weight.device)
    logits: torch.Tensor = model(input_ids=row, logits_to_keep=len(ids) + 1).logits[0, -(len(ids) + 1) :]
    return logits


def divergence(expected_V: torch.Tensor, found: dict[int, float]) -> float:
    """Compute the KL divergence in nats over the tokens that `found` names and one bucket of all others.

    Args:
        expected_V: Log-probabilities of all tokens.
        found: Log-probabilities of the likeliest, by id.
    """
    if not found or any(math.isnan(value) for value in found.values()):
        return math.nan
    numbers = torch.tensor(list(found))
    p = expected_V[numbers].double()
    q = torch.tensor(list(found.values()), dtype=torch.float64)
    rest_p = max(0.0, 1 - float(p.exp().sum()))
    rest_q = max(1e-9, 1 - float(q.exp().sum()))
    total = float((p.exp() * (p - q.clamp(min=-80))).sum())
    if rest_p > 1e-9:
        total += rest_p * math.log(rest_p / rest_q)
    return max(0.0, total)


def distribution_checks(measured: Sequence[Measured], limits: Tolerance, noise: Noise) -> list[Check]:
    """Check divergence and agreement over all prompts."""
    checks = []
    values = [value for row in measured for value in row.divergences]
    broken = sum(not row.finite for row in measured)
    if values or broken:
        mean = sum(values) / len(values) if values else math.inf
        detail = f"{broken} prompts give numbers that are not finite: an overflow" if broken else ""
        if not broken and mean > limits.divergence:
            detail = "the artifact expects other tokens than the judged model"
        name = "next-token distributions (mean KL, nats)"
        passed = not broken and mean <= limits.divergence
        value = None if math.isinf(mean) else round(mean, 6)
        checks.append(Check("distributions", passed, value, limits.divergence, name, detail))
    share, detail = _agreement(measured, noise)
    if share is not None:
        passed = share >= limits.agreement
        value, name = round(share, 4), "greedy agreement"
        checks.append(Check("agreement", passed, value, limits.agreement, name, detail, "at least", "share"))
    return checks


def _agreement(measured: Sequence[Measured], noise: Noise) -> tuple[float | None, str]:
    """Return the share of tokens that are the same, and which were counted."""
    counted, choices = sum(row.counted for row in measured), sum(row.choices for row in measured)
    if not counted:
        return None, ""
    margin = f"lead by more than {TIE_NATS + noise.total:.2f} nats"
    if choices >= ENOUGH:
        same = sum(row.same_choices for row in measured)
        return same / choices, f"{same} of {choices} tokens that are a choice and {margin}"
    same = sum(row.same for row in measured)
    return same / counted, f"{same} of {counted} tokens that {margin}"
