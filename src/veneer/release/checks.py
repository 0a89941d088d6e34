"""The stages of a certificate, each a comparison with its limit, in the order in which a prompt becomes an answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from veneer.data import Renderer
from veneer.evaluate.intervals import Interval, proportion
from veneer.release.artifact import Artifact
from veneer.release.compare_weights import STRENGTH, Compared
from veneer.release.diagnose import diagnose_prompt
from veneer.release.prompts import Prompt
from veneer.release.runtimes import Answer, Runtime

TIE_NATS = 0.05  # tokens this close to the likeliest are as good as it: rounding decides between them


@dataclass(frozen=True)
class Limits:
    """How far an artifact of a precision may be from the adapter.

    Attributes:
        divergence: Mean KL divergence of the next token, nats.
        agreement: Least share of tokens that the adapter would choose too.
    """

    divergence: float
    agreement: float


LIMITS = {
    **{"float32": Limits(0.01, 0.97), "bfloat16": Limits(0.02, 0.95), "float16": Limits(0.02, 0.95)},
    **{"f32": Limits(0.02, 0.95), "f16": Limits(0.02, 0.95), "bf16": Limits(0.02, 0.95), "q8_0": Limits(0.03, 0.95)},
    **{"q6_k": Limits(0.05, 0.93), "q5_k_m": Limits(0.08, 0.92), "q5_k_s": Limits(0.08, 0.92)},
    **{"q4_k_m": Limits(0.2, 0.88), "q4_k_s": Limits(0.2, 0.88), "q4_0": Limits(0.3, 0.85)},
    **{"q3_k_l": Limits(0.5, 0.8), "q3_k_m": Limits(0.5, 0.8), "q3_k_s": Limits(0.7, 0.75), "q2_k": Limits(1.5, 0.6)},
    "endpoint": Limits(0.2, 0.88),
}


@dataclass(frozen=True)
class Check:
    """One stage. `value` and `limit` are numbers, or words where there is no number."""

    id: str
    name: str
    passed: bool
    value: float | str | None
    limit: float | str | None
    detail: str = ""


def unmade(checks: Sequence[Check], has_rows: bool) -> dict[str, str]:
    """What could not be checked and why, by the name of the check."""
    made = {check.id for check in checks}
    reasons = {
        "prompt_tokens": ("prompt tokens", "the server does not tell them"),
        "stop_tokens": ("stop tokens", "the server does not tell them"),
        "weights": ("weights", "a server does not show them"),
        "strength": ("strength of the adapter", "it changes no weight that can be seen"),
        "distributions": ("next-token distributions", "the server names no tokens by their ids"),
    }
    if "weights" not in made:
        reasons["strength"] = (reasons["strength"][0], reasons["weights"][1])
    if has_rows:
        reasons["stops"] = ("answers that end by themselves", "the adapter's own run on to the limit")
    return {name: why for check, (name, why) in reasons.items() if check not in made}


def prompt_checks(runtime: Runtime, renderer: Renderer, prompts: Sequence[Prompt], artifact: Artifact) -> list[Check]:
    """The artifact's tokens of each prompt against the training's."""
    same = known = 0
    wrong = ""
    for prompt in prompts:
        found = runtime.prompt_ids(prompt.messages)
        if found is None:
            count = runtime.prompt_count(prompt.messages)
            if count is not None:
                known += 1
                same += count == len(prompt.ids)
                if count != len(prompt.ids) and not wrong:
                    wrong = f"{prompt.id}: {count} tokens, in training {len(prompt.ids)}"
            continue
        known += 1
        same += found == prompt.ids
        if found != prompt.ids and not wrong:
            wrong = f"{prompt.id}: {diagnose_prompt(renderer, prompt.ids, found, artifact.path)}"
    if not known:
        return []
    return [Check("prompt_tokens", "prompt tokens", same == known, f"{same} of {known} identical", "all", wrong)]


def stop_token_checks(runtime: Runtime, renderer: Renderer) -> list[Check]:
    found = runtime.stop_ids()
    if found is None:
        return []
    missing = sorted(set(renderer.stop_ids) - found)
    names = ", ".join(str(renderer.tokenizer.convert_ids_to_tokens(number)) for number in missing)
    detail = f"{names} is not among its stop tokens: its answers would go on" if missing else ""
    known = f"{len(renderer.stop_ids) - len(missing)} of {len(renderer.stop_ids)} known"
    return [Check("stop_tokens", "stop tokens", not missing, known, "all", detail)]


def weight_checks(compared: Compared | None) -> list[Check]:
    if compared is None:
        return []
    strength = compared.strength
    weak = strength is not None and abs(strength - 1) > STRENGTH
    is_whole = not compared.wrong
    # Where the adapter's strength is what is wrong, that check has the name for it.
    detail = compared.diagnosis
    checks = [
        Check(
            "weights",
            "weights",
            is_whole,
            f"{compared.tensors - len(compared.wrong)} of {compared.tensors} within their precision",
            "all",
            detail if not is_whole else "",
        )
    ]
    if strength is not None:
        checks.append(
            Check(
                "strength",
                "strength of the adapter",
                not weak,
                round(strength, 4),
                f"1 ± {STRENGTH}",
                detail if weak else "",
            )
        )
    return checks


@dataclass(frozen=True)
class Measured:
    divergences: list[float]
    agreed: int
    tokens: int
    finite: bool


@torch.no_grad()
def measure(model: Any, renderer: Renderer, prompt: Prompt, answer: Answer, ends: set[int]) -> Measured:
    """The adapter's distributions along the artifact's answer."""
    ids = answer.ids
    if ids is None:
        ids = list(renderer.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
    device = model.get_input_embeddings().weight.device
    row = torch.tensor([[*prompt.ids, *ids]], device=device)
    logits = model(input_ids=row, logits_to_keep=len(ids) + 1).logits[0, -(len(ids) + 1) :].float()
    expected_TV = logits.log_softmax(-1).cpu()
    chosen = expected_TV.argmax(-1).tolist()
    best = expected_TV.max(-1).values.tolist()
    agreed = sum(best[at] - float(expected_TV[at, number]) <= TIE_NATS for at, number in enumerate(ids))
    agreed += answer.stopped and chosen[len(ids)] in ends
    values = [divergence(expected_TV[at], step) for at, step in enumerate(answer.steps[: len(ids) + 1])]
    finite = all(math.isfinite(value) for value in values)
    return Measured([v for v in values if math.isfinite(v)], agreed, len(ids) + answer.stopped, finite)


def divergence(expected_V: torch.Tensor, found: dict[int, float]) -> float:
    """KL divergence in nats over the tokens that `found` names and one bucket of all others.

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


def distribution_checks(measured: Sequence[Measured], limits: Limits) -> list[Check]:
    values = [value for row in measured for value in row.divergences]
    broken = sum(not row.finite for row in measured)
    tokens = sum(row.tokens for row in measured)
    checks = []
    if values or broken:
        mean = sum(values) / len(values) if values else math.inf
        detail = f"{broken} prompts give numbers that are not finite: an overflow" if broken else ""
        if not broken and mean > limits.divergence:
            detail = "the artifact expects other tokens than the adapter"
        name = "next-token distributions (mean KL, nats)"
        passed = not broken and mean <= limits.divergence
        value = None if math.isinf(mean) else round(mean, 6)
        checks.append(Check("distributions", name, passed, value, limits.divergence, detail))
    if tokens:
        share = sum(row.agreed for row in measured) / tokens
        detail = "" if share >= limits.agreement else "the adapter would choose other tokens"
        checks.append(
            Check("agreement", "greedy agreement", share >= limits.agreement, round(share, 4), limits.agreement, detail)
        )
    return checks


def stop_checks(answers: Sequence[Answer], expected: Sequence[Answer], prompts: Sequence[Prompt]) -> list[Check]:
    rows = [n for n, prompt in enumerate(prompts) if prompt.reference is not None and expected[n].stopped]
    if not rows:
        return []
    ended = sum(answers[n].stopped for n in rows)
    # One answer in fifty may run on: a different word early can lead anywhere.
    least = len(rows) - len(rows) // 50
    detail = "" if ended >= least else "its answers run on where the adapter's end"
    return [Check("stops", "answers that end by themselves", ended >= least, f"{ended} of {len(rows)}", least, detail)]


def score_checks(answers: Sequence[Answer], expected: Sequence[Answer], prompts: Sequence[Prompt]) -> list[Check]:
    rows = [n for n, prompt in enumerate(prompts) if prompt.reference is not None]
    if not rows:
        return []

    def score(of: Sequence[Answer]) -> Interval:
        return proportion(sum(of[n].text == prompts[n].reference for n in rows), len(rows))

    ours, theirs = score(answers), score(expected)
    passed = ours.value >= theirs.low
    limit = f"at least {theirs.low:.1%} (adapter {theirs.value:.1%}, {theirs.low:.1%} to {theirs.high:.1%})"
    value = f"{ours.value:.1%} ({ours.low:.1%} to {ours.high:.1%})"
    detail = "" if passed else "it answers fewer held-out rows right than the adapter"
    return [Check("score", f"exact match on {len(rows)} held-out rows", passed, value, limit, detail)]
