"""`veneer verify`: a healthy run passes every check, and each planted fault fails the one that is made for it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.support.runs import tiny_run, write_rows
from veneer.data.batch import UNTRAINED, Batch, Example
from veneer.engine.choose import EngineChoice, build
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import Objective, StepOutput
from veneer.engine.reference import ReferenceEngine
from veneer.model.attach import save_adapter
from veneer.training import verify as module
from veneer.training.parts import RunParts, load_parts
from veneer.training.verify import Verification, verify_parts

MakeRun = Callable[..., veneer.Run]


@pytest.fixture
def make_run(tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]) -> MakeRun:
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def make(engine: str = "fused", family: str = "llama", **sections: Any) -> veneer.Run:
        return tiny_run(tiny_model(family), path, tmp_path / "run", train={"engine": engine}, **sections)

    return make


def failed(found: Verification) -> set[str]:
    return {check.id for check in found.checks if not check.passed}


def with_engine(run: veneer.Run, wrap: Callable[[Any], Any] = lambda engine: engine) -> tuple[RunParts, EngineChoice]:
    parts = load_parts(run)
    choice = build(parts.model, run.train, "cpu")
    return parts, replace(choice, engine=wrap(choice.engine))


@pytest.mark.parametrize(
    ("engine", "family", "sections"),
    [
        ("fused", "llama", {"adapter": {"lora_dropout": 0.1}}),
        ("fused", "gemma2", {"quantization": {"bits": 4}, "model": {"dtype": "bfloat16"}}),
        ("auto", "gpt2", {"data": {"packing": True}}),
        ("auto", "qwen2", {"adapter": {"target_modules": ["embed_tokens", "v_proj"]}}),
    ],
)
def test_a_healthy_run_passes_and_is_left_as_it_was(
    engine: str, family: str, sections: dict[str, Any], make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(engine, family, **sections)
    parts, choice = with_engine(run)
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    state = torch.get_rng_state()
    heard: list[Any] = []
    found = verify_parts(run, parts, choice, heard.append)
    assert failed(found) == set()
    assert list(found.checks) == heard
    fused = [check for check in found.checks if check.id.startswith("fused-")]
    assert all((check.value is None) == (engine == "auto") == (check.detail != "") for check in fused)
    assert found.choice.engine is choice.engine
    after = dict(parts.model.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad == ("lora_" in name) and p.grad is None for name, p in after.items())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("factor", [1.5, 0.0, -1.0, float("nan")])
def test_a_wrong_kernel_is_found_and_its_layer_named(
    factor: float, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_backward = FusedEngine.forward_backward

    def wrong(self: FusedEngine, batch: Batch, objective: Objective) -> StepOutput:
        output = forward_backward(self, batch, objective)
        name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"
        self.model.get_parameter(name).grad.mul_(factor)
        return output

    monkeypatch.setattr(FusedEngine, "forward_backward", wrong)
    run = make_run()
    found = verify_parts(run, *with_engine(run))
    assert failed(found) == {"fused-gradient", "fused-matrix"}
    details = {check.detail for check in found.checks if not check.passed}
    assert details == {"worst in model.layers.1.self_attn.v_proj.lora_B"}
    assert found.choice.engine.name == "reference", "what the run would train with"


def test_a_kernel_that_cannot_run_is_told(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: FusedEngine, batch: Batch, objective: Objective) -> StepOutput:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(FusedEngine, "forward_backward", fails)
    run = make_run()
    found = verify_parts(run, *with_engine(run))
    assert failed(found) == {"fused-loss", "fused-gradient", "fused-matrix"}
    assert {check.detail for check in found.checks if not check.passed} == {"no kernel image is available"}
    assert found.choice.engine.name == "reference"


def test_a_wrong_loss_is_found(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    forward_backward = FusedEngine.forward_backward

    def wrong(self: FusedEngine, batch: Batch, objective: Objective) -> StepOutput:
        output = forward_backward(self, batch, objective)
        return output._replace(loss=1.01 * output.loss)

    monkeypatch.setattr(FusedEngine, "forward_backward", wrong)
    run = make_run()
    assert failed(verify_parts(run, *with_engine(run))) == {"fused-loss"}


def test_an_adapter_without_gradient_is_found(make_run: MakeRun) -> None:
    run = make_run("reference")
    parts, choice = with_engine(run)
    layer = parts.model.get_base_model().model.layers[1].mlp.up_proj
    layer.lora_A["default"].register_forward_hook(lambda module, inputs, output: output.detach())
    found = verify_parts(run, parts, choice)
    assert failed(found) == {"gradients"}
    (check,) = (check for check in found.checks if not check.passed)
    assert (check.value, check.detail) == (1, "worst in model.layers.1.mlp.up_proj.lora_A")


def test_targets_that_are_shifted_are_found(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: Example) -> Any:
        targets = np.full(len(self.ids), UNTRAINED, dtype=np.int64)
        for start, end, _ in self.spans:
            targets[start - 1 : end - 1] = self.ids[start - 1 : end - 1]
        return targets

    monkeypatch.setattr(Example, "targets", property(shifted))
    run = make_run()
    assert failed(verify_parts(run, *with_engine(run))) == {"targets"}


class Leaking(ReferenceEngine):
    """Later rows of a batch notice the first one's tokens."""

    def token_logprobs(self, batch: Batch) -> torch.Tensor:
        logprobs = super().token_logprobs(batch)
        first = int((batch.targets_T[: batch.lengths[0]] >= 0).sum())
        logprobs[first:] -= 1e-3 * float(batch.ids_T[0] + batch.lengths[0])
        return logprobs


def test_rows_that_see_each_other_are_found(make_run: MakeRun) -> None:
    run = make_run("reference")
    found = verify_parts(run, *with_engine(run, lambda engine: Leaking(engine.model)))
    assert {"packed", "isolated"} <= failed(found)


class Ascending(ReferenceEngine):
    """Its gradient points uphill."""

    def forward_backward(self, batch: Batch, objective: Objective) -> StepOutput:
        return super().forward_backward(batch.scaled(-batch.scale), objective)


class Frozen(ReferenceEngine):
    """Its gradients are too small to move anything."""

    def forward_backward(self, batch: Batch, objective: Objective) -> StepOutput:
        return super().forward_backward(batch.scaled(batch.scale * 1e-12), objective)


@pytest.mark.parametrize("kind", [Ascending, Frozen])
def test_a_run_that_would_not_learn_is_found(kind: Any, make_run: MakeRun) -> None:
    run = make_run("reference")
    found = verify_parts(run, *with_engine(run, lambda engine: kind(engine.model)))
    assert failed(found) == {"overfit"}


@pytest.mark.parametrize("damage", ["values", "alpha"])
def test_an_adapter_file_that_is_not_the_live_one_is_found(
    damage: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, tokenizer: Any, template: Any, base: Any, folder: Path) -> None:
        save_adapter(model, tokenizer, template, base, folder)
        if damage == "values":
            path = folder / "adapter_model.safetensors"
            save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
        else:
            path = folder / "adapter_config.json"
            path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))

    monkeypatch.setattr(module, "save_adapter", wrong)
    run = make_run()
    found = verify_parts(run, *with_engine(run))
    assert failed(found) == {"reload"}


def test_data_that_teaches_nothing_is_found(make_run: MakeRun) -> None:
    run = make_run()
    parts, choice = with_engine(run)
    parts.data.ledger.tokens["end_of_turn"] = 0
    parts.data.train.corpus.trained[parts.data.train.examples[3]] = 0
    found = verify_parts(run, parts, choice)
    assert failed(found) == {"mask", "end-of-turn"}


def test_plain_text_has_no_turns_to_end(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat and the dog\nthe owl and the hen says what\n" * 4)
    run = make_run(data={"train": str(tmp_path / "text.txt"), "duplicates": "keep"})
    found = verify_parts(run, *with_engine(run))
    assert found.passed
    (check,) = (check for check in found.checks if check.id == "end-of-turn")
    assert (check.value, check.detail) == (None, "plain text has no turns")
