"""The certificate: does what ships behave like the adapter it came from?

The same conversations go through the adapter on its base and through the artifact as its users run it. The checks
stand in the order in which a prompt becomes an answer, so the first that fails is where to look:

    prompt tokens    the artifact's own tokenizer and template make the tokens of the training
    stop tokens      it knows every token at which an answer ends
    weights          its tensors are base and adapter, within the error of their precision
    strength         the adapter is in with all of its strength
    distributions    KL divergence of the next token, adapter against artifact, along the artifact's own answers
    agreement        how often the adapter would choose the artifact's token, near ties aside
    stops            answers end by themselves where the adapter's do
    score            exact match on held-out rows lies within the interval of the adapter's

Divergences are computed along the artifact's answers: the adapter reads each answer in one pass, so both sides see the
same text at every position. The artifact names its likeliest tokens, all others are one bucket; what is so computed is
at most the true divergence. Limits hang on the artifact's precision and stand beside each value.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from veneer.config.folder import write_json
from veneer.data import Renderer
from veneer.model import load_adapter, load_model
from veneer.plan import find_machine
from veneer.release.artifact import Artifact, running
from veneer.release.checks import (
    LIMITS,
    Check,
    Measured,
    distribution_checks,
    measure,
    prompt_checks,
    score_checks,
    stop_checks,
    stop_token_checks,
    unmade,
    weight_checks,
)
from veneer.release.compare_weights import Compared, compare_weights
from veneer.release.merge import stop_ids
from veneer.release.origin import Origin
from veneer.release.prompts import Prompt
from veneer.release.runtimes import Answer, Runtime, greedy
from veneer.train.job import environment

EDGE_TOKENS = 16  # longest answer to an edge case


@dataclass(frozen=True)
class Certificate:
    """The proof, or what is wrong."""

    artifact: dict[str, Any]
    against: dict[str, Any]
    checks: list[Check]
    skipped: dict[str, str]
    prompts: list[dict[str, Any]]
    environment: dict[str, Any]
    seconds: float
    first_difference: str | None = field(init=False)
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        failed = next((check for check in self.checks if not check.passed), None)
        object.__setattr__(self, "passed", failed is None)
        told = None if failed is None else failed.name + (f": {failed.detail}" if failed.detail else "")
        object.__setattr__(self, "first_difference", told)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def certify_artifact(
    artifact: Artifact,
    origin: Origin,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    skipped: dict[str, str],
    tell: Callable[[str], None] = lambda what: None,
) -> Certificate:
    """Put an artifact beside the adapter it came from.

    Args:
        artifact: What ships.
        origin: The adapter and its base.
        prompts: What both are asked.
        max_new_tokens: Longest answer.
        skipped: Checks that cannot be made, and why.
        tell: Called with what is being done.
    """
    started = time.perf_counter()
    renderer = origin.renderer()
    checks: list[Check] = []
    compared: Compared | None = None
    if artifact.path is not None:
        tell("comparing weights")
        compared = compare_weights(origin, artifact.path, artifact.on)
    with running(artifact, renderer, prompts, max_new_tokens) as runtime:
        checks += prompt_checks(runtime, renderer, prompts, artifact)
        checks += stop_token_checks(runtime, renderer)
        checks += weight_checks(compared)
        tell("the artifact answers")
        answers = _answers(runtime, prompts, max_new_tokens)
        runtime_kind = runtime.kind
    del runtime
    tell("the adapter answers")
    model = _reference(origin, artifact)
    ends = set(stop_ids(origin, origin.base_folder))
    expected = _reference_answers(model, renderer, prompts, max_new_tokens, ends)
    tell("the adapter reads the artifact's answers")
    measured = [measure(model, renderer, prompt, answer, ends) for prompt, answer in zip(prompts, answers, strict=True)]
    checks += distribution_checks(measured, LIMITS.get(artifact.precision, LIMITS["endpoint"]))
    checks += stop_checks(answers, expected, prompts)
    checks += score_checks(answers, expected, prompts)
    skipped = skipped | unmade(checks, any(prompt.reference is not None for prompt in prompts))
    return Certificate(
        artifact={
            "name": artifact.name,
            "kind": artifact.kind,
            "precision": artifact.precision,
            "runtime": runtime_kind,
        },
        against={
            "name": origin.name,
            "base": origin.model.base,
            "on": artifact.on,
            "dtype": str(origin.dtype).removeprefix("torch."),
        },
        checks=checks,
        skipped=skipped,
        prompts=[_record(*row) for row in zip(prompts, answers, expected, measured, strict=True)],
        environment=environment(),
        seconds=round(time.perf_counter() - started, 1),
    )


def write_certificate(certificate: Certificate, folder: Path, page: str) -> None:
    """Write certificate.json and certificate.html into a folder."""
    from veneer.config.folder import write_text

    write_json(folder / "certificate.json", certificate.as_dict())
    write_text(folder / "certificate.html", page)


def _answers(runtime: Runtime, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
    """Answers to rows at full length, to edge cases cut short."""
    rows = [prompt for prompt in prompts if prompt.reference is not None]
    edges = [prompt for prompt in prompts if prompt.reference is None]
    return runtime.answer([prompt.messages for prompt in rows], max_new_tokens) + runtime.answer(
        [prompt.messages for prompt in edges], min(EDGE_TOKENS, max_new_tokens)
    )


def _reference(origin: Origin, artifact: Artifact) -> Any:
    """The adapter on the base that the artifact was made on, in the precision of the training."""
    quantization = origin.quantization if artifact.on == "nf4" else None
    dtype = str(origin.dtype).removeprefix("torch.")
    settings = origin.model.model_copy(update={"dtype": dtype})
    return load_adapter(load_model(origin.source, settings, quantization, find_machine()), origin.adapter)


def _reference_answers(
    model: Any, renderer: Renderer, prompts: Sequence[Prompt], max_new_tokens: int, ends: set[int]
) -> list[Answer]:
    found: list[Answer] = []
    for rows, limit in (
        ([p.ids for p in prompts if p.reference is not None], max_new_tokens),
        ([p.ids for p in prompts if p.reference is None], min(EDGE_TOKENS, max_new_tokens)),
    ):
        found += greedy(model, renderer.tokenizer, rows, limit, ends) if rows else []
    return found


def _record(prompt: Prompt, answer: Answer, expected: Answer, measured: Measured) -> dict[str, Any]:
    mean = sum(measured.divergences) / len(measured.divergences) if measured.divergences else None
    return {
        "id": prompt.id,
        "prompt": prompt.messages[-1].content[:500],
        "tokens": len(prompt.ids),
        "adapter": expected.text,
        "artifact": answer.text,
        "reference": prompt.reference,
        "adapter_stopped": expected.stopped,
        "artifact_stopped": answer.stopped,
        "mean_kl": None if mean is None else round(mean, 6),
        "agreement": round(measured.agreed / measured.tokens, 4) if measured.tokens else None,
    }
