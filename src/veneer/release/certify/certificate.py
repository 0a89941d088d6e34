"""The certificate says whether an artifact behaves like the model that was evaluated.

`veneer evaluate` scores the adapter on its base in its bits; for QLoRA that is the 4-bit base. The same conversations
go through that model and through the artifact as its users run it, whatever the artifact was merged into. Checks of how
it was made stand first, in the order in which a prompt becomes an answer, so the first that fails is where to look;
then what it does, the task's score before single tokens:

    prompt tokens    the artifact's own tokenizer and template make the tokens of the training
    stop tokens      it knows every token at which an answer ends
    settings         its architecture's settings are the base's (settings.py)
    decoding         its generation settings choose tokens as the run was judged: greedily (settings.py)
    weights          its tensors are base and adapter, within the error of their precision (compare_weights.py)
    strength         the adapter is in with all of its strength
    score            held-out rows right, paired row by row with the judged answers (verdict.py)
    stops            answers end by themselves where the judged ones do
    distributions    KL divergence of the next token along the artifact's answers (agreement.py)
    agreement        how often the judged model would choose the artifact's token, rounding aside (agreement.py)

Limits hang on the artifact's precision and stand beside each value. What cannot be checked is listed as such.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veneer.config.files import file_sha256
from veneer.config.folder import write_json
from veneer.config.results import Check
from veneer.data.render import Renderer
from veneer.machine.environment import environment
from veneer.model.adapters.dora import norms_kept
from veneer.model.dense import adapter_in_copies
from veneer.model.tuned import TunedModel
from veneer.release.certify.agreement import (
    LIMITS,
    OTHER_BASE,
    Measured,
    Noise,
    Tolerance,
    distribution_checks,
    measure,
    noise_between,
)
from veneer.release.certify.artifact import Artifact, running
from veneer.release.certify.checks import prompt_checks, stop_checks, unmade, weight_checks
from veneer.release.certify.compare_weights import Compared, compare_weights
from veneer.release.certify.judged import Recorded
from veneer.release.certify.prompts import Prompt
from veneer.release.certify.runtimes import Answer, Runtime, greedy
from veneer.release.certify.settings import setting_checks, stop_token_checks
from veneer.release.certify.verdict import verdict_of
from veneer.release.merge.plan import trained_on

EDGE_TOKENS = 16  # longest answer to an edge case
NOT_HASHED = ("certificate.json", "certificate.html", "README.md")


@dataclass(frozen=True)
class Certificate:
    """The result of a certification.

    Attributes:
        date: Time of the certificate, UTC, ISO 8601.
        artifact, against: both sides of the comparison, with their SHA-256.
        score: Held-out rows in pairs, with the verdict; None: none were asked.
        noise: Difference between two runs of the same side, nats.
        prompts: Each prompt with both answers.
    """

    date: str
    artifact: dict[str, Any]
    against: dict[str, Any]
    checks: list[Check]
    skipped: dict[str, str]
    score: dict[str, Any] | None
    noise: dict[str, float]
    prompts: list[dict[str, Any]]
    environment: dict[str, Any]
    seconds: float
    first_difference: str | None = field(init=False)
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        failed = next((check for check in self.checks if not check.passed), None)
        object.__setattr__(self, "passed", failed is None)
        message = None if failed is None else failed.name + (f": {failed.detail}" if failed.detail else "")
        object.__setattr__(self, "first_difference", message)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def certify_artifact(
    artifact: Artifact,
    tuned: TunedModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    skipped: dict[str, str],
    recorded: dict[str, Recorded],
    on_status: Callable[[str], None] = lambda what: None,
) -> Certificate:
    """Put an artifact beside the model that its run was judged by.

    Args:
        artifact: Artifact to be certified.
        tuned: The adapter and its base.
        prompts: Prompts for both: held-out rows first, then edge cases.
        max_new_tokens: Longest answer.
        skipped: Checks that cannot be made, and why.
        recorded: Answers that evaluation recorded, by the place of their row; rows without one are answered again.
        on_status: Callback that gets a line of status.
    """
    started = time.perf_counter()
    renderer = tuned.renderer
    checks: list[Check] = []
    compared: Compared | None = None
    settings: list[Check] = []
    if artifact.path is not None:
        on_status("comparing weights")
        compared = compare_weights(tuned, artifact.path, artifact.on)
        settings = setting_checks(tuned, artifact.path, compared.unties)
    edges = [prompt for prompt in prompts if prompt.reference is None]
    batch = batch_of(tuned)
    with running(artifact, renderer, prompts, max_new_tokens, batch) as runtime:
        if artifact.kind == "endpoint":
            prompts = [prompt.as_read(runtime.prompt_ids(prompt.messages)) for prompt in prompts]
            edges = [prompt for prompt in prompts if prompt.reference is None]
        checks += prompt_checks(runtime, renderer, prompts, artifact)
        checks += stop_token_checks(runtime.stop_ids(), renderer)
        checks += settings + weight_checks(compared)
        on_status("the artifact answers")
        answers = _answers(runtime, prompts, max_new_tokens)
        again = [_edge_answers(runtime, [edge], max_new_tokens)[0] for edge in edges]
        runtime_kind = runtime.kind
    del runtime
    on_status("the judged model answers")
    model = tuned.load(tuned.dtype)
    ends = set(tuned.stop_ids)
    at = len(prompts) - len(edges)
    with adapter_in_copies(model), norms_kept(model):  # as evaluation answers
        judged, source = judged_answers(model, renderer, prompts, max_new_tokens, ends, recorded, batch)
        single = [greedy(model, renderer.tokenizer, [edge.ids], _edge_limit(max_new_tokens), ends)[0] for edge in edges]
        noise = Noise(noise_between(judged[at:], single), noise_between(answers[at:], again))
        on_status("the judged model reads the artifact's answers")
        measured = [
            measure(model, renderer, prompt, answer, ends, noise.total)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    settled = tuned.run.evaluate if tuned.run is not None else None
    verdict = verdict_of(prompts, judged, answers, source, settled)
    checks += [] if verdict is None else [verdict.check()]
    checks += stop_checks(answers, judged, prompts)
    checks += distribution_checks(measured, _limits(artifact, tuned), noise)
    turns = [*(verdict.turns() if verdict is not None else ()), *[None] * len(edges)]
    skipped = skipped | unmade(checks, any(prompt.reference is not None for prompt in prompts))
    return Certificate(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        artifact=_artifact_facts(artifact, runtime_kind),
        against=_judged_facts(tuned),
        checks=checks,
        skipped=skipped,
        score=None if verdict is None else verdict.as_dict(),
        noise={"judged": round(noise.judged, 4), "artifact": round(noise.artifact, 4)},
        prompts=[_record(*row) for row in zip(prompts, answers, judged, measured, turns, strict=True)],
        environment=environment(),
        seconds=round(time.perf_counter() - started, 1),
    )


def write_certificate(certificate: Certificate, folder: Path, page: str) -> None:
    """Write certificate.json and certificate.html into a folder."""
    from veneer.config.folder import write_text

    write_json(folder / "certificate.json", certificate.as_dict())
    write_text(folder / "certificate.html", page)


def batch_of(tuned: TunedModel) -> int:
    """Return the number of rows that evaluation, and so the certificate, answers together."""
    return 16 if tuned.run is None else tuned.run.evaluate.batch_size


def _edge_limit(max_new_tokens: int) -> int:
    return min(EDGE_TOKENS, max_new_tokens)


def _answers(runtime: Runtime, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
    """Answer rows at full length, and edge cases cut short."""
    rows = [prompt for prompt in prompts if prompt.reference is not None]
    edges = [prompt for prompt in prompts if prompt.reference is None]
    found = runtime.answer([prompt.messages for prompt in rows], max_new_tokens) if rows else []
    return found + _edge_answers(runtime, edges, max_new_tokens)


def _edge_answers(runtime: Runtime, edges: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
    return runtime.answer([edge.messages for edge in edges], _edge_limit(max_new_tokens)) if edges else []


def judged_answers(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    ends: set[int],
    recorded: dict[str, Recorded],
    batch: int,
) -> tuple[list[Answer], str]:
    """Return the judged model's answers, rows first, and the source of those to rows."""
    rows = [prompt for prompt in prompts if prompt.reference is not None]
    edges = [prompt for prompt in prompts if prompt.reference is None]
    known = [recorded.get(row.id) for row in rows]
    found: list[Answer] = []
    if rows and all(was is not None and was.reference == row.reference for was, row in zip(known, rows)):
        source = "samples.jsonl"
        for was in known:
            assert was is not None
            count = len(renderer.tokenizer(was.text, add_special_tokens=False)["input_ids"])
            found.append(Answer(was.text, None, count < max_new_tokens, []))
    else:
        source = "answered again"
        ids = [row.ids for row in rows]
        found += greedy(model, renderer.tokenizer, ids, max_new_tokens, ends, batch) if rows else []
    if edges:
        found += greedy(model, renderer.tokenizer, [edge.ids for edge in edges], _edge_limit(max_new_tokens), ends)
    return found, source


def _limits(artifact: Artifact, tuned: TunedModel) -> Tolerance:
    limits = LIMITS.get(artifact.precision, LIMITS["endpoint"])
    return limits if artifact.on == trained_on(tuned) else limits.at_least(OTHER_BASE)


def _artifact_facts(artifact: Artifact, runtime: str) -> dict[str, Any]:
    return {
        "name": artifact.name,
        "kind": artifact.kind,
        "precision": artifact.precision,
        "on": artifact.on,
        "runtime": runtime,
        "sha256": None if artifact.path is None else artifact_sha256(artifact.path),
    }


def _judged_facts(tuned: TunedModel) -> dict[str, Any]:
    return {
        "name": tuned.name,
        "base": tuned.model.base,
        "on": trained_on(tuned),
        "dtype": tuned.dtype_name,
        "adapter_sha256": tuned.weights_sha256,
    }


def artifact_sha256(path: Path) -> str:
    """Return SHA-256 of a GGUF file; of a folder, that of the lines `NAME SHA256` of its files, sorted by name."""
    if path.is_file():
        return file_sha256(path) or ""
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name not in NOT_HASHED)
    lines = "".join(f"{file.name} {file_sha256(file)}\n" for file in files if not file.name.startswith("."))
    return hashlib.sha256(lines.encode()).hexdigest()


def _record(prompt: Prompt, answer: Answer, judged: Answer, measured: Measured, turn: str | None) -> dict[str, Any]:
    mean = sum(measured.divergences) / len(measured.divergences) if measured.divergences else None
    return {
        "id": prompt.id,
        "prompt": prompt.messages[-1].content[:500],
        "tokens": len(prompt.ids),
        "adapter": judged.text,
        "artifact": answer.text,
        "reference": prompt.reference,
        "turn": turn,
        "adapter_stopped": judged.stopped,
        "artifact_stopped": answer.stopped,
        "mean_kl": None if mean is None else round(mean, 6),
        "agreement": round(measured.same / measured.counted, 4) if measured.counted else None,
    }
