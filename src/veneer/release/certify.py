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

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer.config import UserError
from veneer.config.folder import write_json
from veneer.data import Renderer
from veneer.evaluate.intervals import Interval, proportion
from veneer.model import load_adapter, load_model
from veneer.plan import find_machine
from veneer.release.compare_weights import STRENGTH, Compared, compare_weights
from veneer.release.diagnose import diagnose_prompt
from veneer.release.merge import stop_ids
from veneer.release.origin import Origin
from veneer.release.prompts import Prompt
from veneer.release.runtimes import Answer, Endpoint, Folder, Runtime, greedy, llama_server
from veneer.train.job import environment

EDGE_TOKENS = 16  # longest answer to an edge case
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


@dataclass(frozen=True)
class Artifact:
    """What is to be certified.

    Attributes:
        name: What the user wrote.
        kind: transformers, gguf or endpoint.
        precision: Key of LIMITS.
        path: Of a folder or a file.
        on: What the adapter was merged into.
    """

    name: str
    kind: str
    precision: str
    path: Path | None
    on: str


def find_artifact(name: str, origin: Origin) -> Artifact:
    """What a name stands for: an address, a GGUF file, or a folder that holds either.

    Raises:
        UserError: It is nothing that can be certified.
    """
    trained_on = "nf4" if origin.quantization is not None else "base"
    if name.startswith(("http://", "https://")):
        return Artifact(name, "endpoint", "endpoint", None, trained_on)
    path = Path(name).expanduser()
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) > 1:
        raise UserError(f"{name}: holds {len(files)} GGUF files", f"name one of them, for example {files[0]}")
    if files and files[0].suffix.lower() == ".gguf" and files[0].is_file():
        precision, on = _gguf_facts(files[0])
        return Artifact(name, "gguf", precision, files[0], on)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{name}: neither a model's folder (no config.json), nor a GGUF file, nor an address (http://...)",
            "name what `veneer merge` or `veneer export` wrote, or a server",
        )
    merged = path / "merge.json"
    kept = json.loads(merged.read_text(encoding="utf-8")) if merged.is_file() else {}
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    precision = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return Artifact(name, "transformers", precision, path, kept.get("on", "base"))


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
    with _run(artifact, origin, renderer, prompts, max_new_tokens) as runtime:
        checks += _prompt_checks(runtime, renderer, prompts, artifact)
        checks += _stop_token_check(runtime, origin, renderer)
        checks += _weight_checks(compared)
        tell("the artifact answers")
        answers = _answers(runtime, prompts, max_new_tokens)
        runtime_kind = runtime.kind
    del runtime
    tell("the adapter answers")
    model = _reference(origin, artifact)
    ends = set(stop_ids(origin, origin.base_folder))
    expected = _reference_answers(model, renderer, prompts, max_new_tokens, ends)
    tell("the adapter reads the artifact's answers")
    measured = [
        _measure(model, renderer, prompt, answer, ends) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    checks += _distribution_checks(measured, LIMITS.get(artifact.precision, LIMITS["endpoint"]))
    checks += _stop_check(answers, expected, prompts)
    checks += _score_check(answers, expected, prompts)
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


def _gguf_facts(file: Path) -> tuple[str, str]:
    from gguf import GGUFReader

    from veneer.release.gguf_types import QUANTS

    try:
        fields = GGUFReader(file).fields
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{file}: not a GGUF file ({error})", "name what `veneer export` wrote") from None
    number = fields["general.file_type"].contents() if "general.file_type" in fields else None
    names = {number: name for name, (number, _, _) in QUANTS.items()}
    on = fields["veneer.on"].contents() if "veneer.on" in fields else "base"
    return names.get(-1 if number is None else int(number), "q4_k_m"), str(on)


def _run(
    artifact: Artifact, origin: Origin, renderer: Renderer, prompts: Sequence[Prompt], max_new_tokens: int
) -> AbstractContextManager[Runtime]:
    if artifact.kind == "transformers":
        assert artifact.path is not None
        return nullcontext(Folder(artifact.path, find_machine()))
    if artifact.kind == "endpoint":
        return nullcontext(Endpoint(artifact.name, renderer.is_chat))
    from gguf import GGUFReader

    assert artifact.path is not None
    fields = GGUFReader(artifact.path).fields
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    stops = {int(fields[key].contents()) for key in keys if key in fields}
    context = max(len(prompt.ids) for prompt in prompts) + max_new_tokens + 16
    return llama_server(artifact.path, renderer.is_chat, stops, context)


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


def _prompt_checks(runtime: Runtime, renderer: Renderer, prompts: Sequence[Prompt], artifact: Artifact) -> list[Check]:
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


def _stop_token_check(runtime: Runtime, origin: Origin, renderer: Renderer) -> list[Check]:
    found = runtime.stop_ids()
    if found is None:
        return []
    missing = sorted(set(renderer.stop_ids) - found)
    names = ", ".join(str(renderer.tokenizer.convert_ids_to_tokens(number)) for number in missing)
    detail = f"{names} is not among its stop tokens: its answers would go on" if missing else ""
    known = f"{len(renderer.stop_ids) - len(missing)} of {len(renderer.stop_ids)} known"
    return [Check("stop_tokens", "stop tokens", not missing, known, "all", detail)]


def _weight_checks(compared: Compared | None) -> list[Check]:
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
class _Measured:
    divergences: list[float]
    agreed: int
    tokens: int
    finite: bool


@torch.no_grad()
def _measure(model: Any, renderer: Renderer, prompt: Prompt, answer: Answer, ends: set[int]) -> _Measured:
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
    return _Measured([v for v in values if math.isfinite(v)], agreed, len(ids) + answer.stopped, finite)


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


def _distribution_checks(measured: Sequence[_Measured], limits: Limits) -> list[Check]:
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


def _stop_check(answers: Sequence[Answer], expected: Sequence[Answer], prompts: Sequence[Prompt]) -> list[Check]:
    rows = [n for n, prompt in enumerate(prompts) if prompt.reference is not None and expected[n].stopped]
    if not rows:
        return []
    ended = sum(answers[n].stopped for n in rows)
    # One answer in fifty may run on: a different word early can lead anywhere.
    least = len(rows) - len(rows) // 50
    detail = "" if ended >= least else "its answers run on where the adapter's end"
    return [Check("stops", "answers that end by themselves", ended >= least, f"{ended} of {len(rows)}", least, detail)]


def _score_check(answers: Sequence[Answer], expected: Sequence[Answer], prompts: Sequence[Prompt]) -> list[Check]:
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


def _record(prompt: Prompt, answer: Answer, expected: Answer, measured: _Measured) -> dict[str, Any]:
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
