"""`veneer verify` of runs on pairs: a healthy run passes every check, and each planted fault fails its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.support.runs import some_pairs, tiny_run, write_rows
from veneer.data.batch import Batch
from veneer.engine.choose import build
from veneer.engine.interface import document_losses
from veneer.engine.objective import Objective, StepOutput, TrainedTokens
from veneer.engine.reference import ReferenceEngine
from veneer.training import verify as module
from veneer.training.objectives import DirectPreference
from veneer.training.objectives.pairs import Answers, Compared, difference, margin_loss, opposed
from veneer.training.parts import RunParts, load_parts
from veneer.training.reference_logprobs import LiveReference
from veneer.training.verify import Verification, verify_parts

OF_PAIRS = {"log-ratio", "start-loss", "reference", "answer-ends", "split", "preference-gradient", "preferred"}
MakeRun = Callable[..., veneer.Run]


@pytest.fixture(scope="module")
def start(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives the supervised run of a family that runs on pairs start from."""
    folder = tmp_path_factory.mktemp("start")
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in some_pairs()]
    file = write_rows(folder / "rows.jsonl", rows)

    def get(family: str) -> Path:
        if not (folder / family).exists():
            veneer.train(tiny_run(tiny_model(family), file, folder / family, train={"learning_rate": 3e-2}))
        return folder / family

    return get


@pytest.fixture
def make_run(tiny_model: Callable[..., Path], tmp_path: Path, start: Callable[[str], Path]) -> MakeRun:
    pairs = write_rows(tmp_path / "pairs.jsonl", some_pairs())

    def make(
        engine: str = "reference", family: str = "llama", starts: bool = True, sections: Any = None, **train: Any
    ) -> veneer.Run:
        sections = {"model": {}} | (sections or {})
        sections["model"] = sections["model"] | {"adapter": str(start(family)) if starts else None}
        return tiny_run(tiny_model(family), pairs, tmp_path / "run", train={"engine": engine} | train, **sections)

    return make


def verified(run: veneer.Run, engine: Callable[[Any], Any] = lambda engine: engine) -> Verification:
    return verify_loaded(run, load_parts(run), engine)


def verify_loaded(
    run: veneer.Run, parts: RunParts, engine: Callable[[Any], Any] = lambda engine: engine
) -> Verification:
    choice = build(parts.model, run.train, "cpu")
    return verify_parts(run, parts, replace(choice, engine=engine(choice.engine)))


def failed(found: Verification) -> set[str]:
    return {check.id for check in found.checks if not check.passed}


HEALTHY: list[dict[str, Any]] = [
    {"engine": "fused"},
    {"engine": "fused", "reference": "live", "sections": {"adapter": {"lora_dropout": 0.1}}},
    {"reference": "live", "dpo": {"loss_type": "ipo"}},
    {"dpo": {"loss_type": "hinge", "beta": 0.3}, "starts": False},
    {"engine": "fused", "family": "gemma2", "sections": {"model": {"dtype": "bfloat16"}}},
    {"sections": {"model": {"dtype": "bfloat16"}, "quantization": {"bits": 4}}, "starts": False},
]


@pytest.mark.parametrize("settings", HEALTHY, ids=lambda settings: " ".join(map(str, settings.values())))
def test_a_healthy_run_passes_and_is_left_as_it_was(settings: dict[str, Any], make_run: MakeRun) -> None:
    run = make_run(**settings)
    parts = load_parts(run)
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    found = verify_loaded(run, parts)
    assert failed(found) == set()
    checks = {check.id: check for check in found.checks}
    assert set(checks) >= OF_PAIRS
    assert all(checks[name].value is not None for name in OF_PAIRS)
    assert checks["log-ratio"].value == checks["reference"].value == checks["log-ratio"].limit == 0
    assert checks["start-loss"].limit == 1e-12
    after = dict(parts.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_has_no_reference_is_not_compared_with_one(make_run: MakeRun) -> None:
    found = verified(make_run(reference="none"))
    assert failed(found) == set()
    skipped = {check.id: check.detail for check in found.checks if check.value is None}
    for name in ("log-ratio", "start-loss", "reference", "preferred"):
        assert skipped[name].startswith("the run compares with no reference"), name


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_a_reference_that_is_the_base_is_found(
    reference: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_the_base(engine: Any, batch: Batch) -> list[float]:
        with engine.adapter_off():
            return document_losses(engine, batch)

    monkeypatch.setattr("veneer.training.reference_logprobs.document_losses", of_the_base)
    assert failed(verified(make_run(reference=reference))) == {"log-ratio", "start-loss", "reference"}


def test_a_reference_that_follows_the_adapter_is_found(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveReference, "_exchange", lambda self: None)
    assert failed(verified(make_run(reference="live"))) == {"reference"}


def test_a_start_that_was_not_taken_is_found(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("veneer.training.parts.take_weights", lambda model, folder, name: None)
        run = make_run()
        parts = load_parts(run)
    assert failed(verify_loaded(run, parts)) == {"reference"}


def test_an_answer_without_its_end_is_found(make_run: MakeRun) -> None:
    run = make_run()
    parts = load_parts(run)
    parts.data.train.corpus.ends[parts.data.train.examples[3]] = 0  # of a rejected answer
    found = verify_loaded(run, parts)
    assert failed(found) == {"answer-ends"}
    assert next(check.value for check in found.checks if check.id == "answer-ends") == 1


@dataclass(frozen=True)
class EndsIgnored(DirectPreference):
    """The last token of each document does not count."""

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor]:
        output, coefficients_N = super().__call__(tokens)
        document_N = tokens.to_tokens(torch.arange(len(tokens.bounds) - 1))
        is_last_N = torch.diff(document_N, append=document_N.new_tensor([-1])) != 0
        return output, torch.where(is_last_N, 0.0, coefficients_N)


@dataclass(frozen=True)
class Steeper(DirectPreference):
    """Its coefficients are not the loss's derivative."""

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor]:
        output, coefficients_N = super().__call__(tokens)
        return output, 1.5 * coefficients_N


@dataclass(frozen=True)
class Averaged(DirectPreference):
    """The loss of a micro-batch is a mean already, and divided once more."""

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor]:
        output, coefficients_N = super().__call__(tokens)
        pairs = (len(tokens.bounds) - 1) / 2
        return output._replace(loss=output.loss / pairs), coefficients_N / pairs


@dataclass(frozen=True)
class Swapped(DirectPreference):
    """It prefers the rejected answer."""

    def compare(self, tokens: TrainedTokens, answers: Answers) -> Compared:
        found = super().compare(tokens, answers)
        loss_P, slope_P = margin_loss(-difference(found.reward_D), self.loss_type, self.beta, 0.0)
        return found._replace(loss_P=loss_P, slope_D=opposed(-slope_P) * self.beta)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (EndsIgnored, {"answer-ends", "preference-gradient"}),
        (Steeper, {"preference-gradient"}),
        (Averaged, {"split", "start-loss", "overfit"}),
        (Swapped, {"preferred"}),
    ],
)
def test_a_wrong_objective_is_found(
    kind: Callable[[], Objective], wanted: set[str], make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "choose_objective", lambda run, data: kind())
    found = failed(verified(make_run()))
    assert found >= wanted - {"overfit"}
    assert found <= wanted


class Ascending(ReferenceEngine):
    """Its gradient points uphill."""

    def forward_backward(self, batch: Batch, objective: Objective) -> StepOutput:
        return super().forward_backward(batch.scaled(-batch.scale), objective)


def test_a_run_that_would_not_learn_is_found(make_run: MakeRun) -> None:
    found = failed(verified(make_run(), lambda engine: Ascending(engine.model)))
    assert found == {"preference-gradient", "overfit", "preferred"}


@pytest.mark.parametrize(
    ("adapter", "quantization", "dtype", "reference"),
    [
        ({"method": "dora"}, None, "bfloat16", "cached"),
        ({"method": "hra", "lora_alpha": 32}, None, "float32", "live"),
        ({"init_lora_weights": "pissa"}, None, "float32", "cached"),
        ({"init_lora_weights": "pissa"}, None, "float32", "live"),
        ({"init_lora_weights": "loftq"}, {}, "float32", "live"),
    ],
)
def test_methods_that_do_not_begin_as_the_base_are_their_own_reference(
    adapter: dict[str, Any], quantization: Any, dtype: str, reference: str, make_run: MakeRun
) -> None:
    sections = {"adapter": adapter, "quantization": quantization, "model": {"dtype": dtype}}
    run = make_run(starts=False, sections=sections, reference=reference)
    (found,) = [check for check in verified(run).checks if check.id == "reference"]
    assert (found.passed, found.value) == (True, 0.0)
    assert "the adapter as it begins" in found.name
