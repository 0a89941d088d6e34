"""Modules and ranks by patterns: what PEFT adapts, what the plan counts, what comes out of a run, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import veneer
from tests.support.classifiers import save_tiny_base
from tests.support.engines import batch_of, gradients, model_of, worst
from tests.support.plans import planner_of
from tests.support.runs import StopAt, losses, some_rows, tiny_run, write_rows
from tests.support.tiny import FAMILIES
from veneer.config import Adapter, Interrupted, UserError
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.model.attach import attach, count_parameters
from veneer.model.classifier import classifier_shapes
from veneer.model.shapes import shapes_of
from veneer.model.target_modules import rank_of

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 7, "up_proj": 3},
    "alpha_pattern": {"v_proj": 30, "layers.0.mlp.gate_proj": 5},
}


def adapted(family: str, **settings: Any) -> tuple[Any, set[str]]:
    """A tiny model with an adapter, and the paths that it is on."""
    name, sizes = FAMILIES[family]
    base = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes))
    model = attach(base, Adapter(**{"r": 4} | settings), 0)
    on = {path for path, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    return model, on


def names(paths: set[str]) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in paths}


@pytest.mark.parametrize(
    ("settings", "expected", "layers"),
    [
        ({"target_modules": "attention"}, ATTENTION, {0, 1}),
        ({"target_modules": "mlp"}, MLP, {0, 1}),
        ({"target_modules": ["attention", "down_proj"]}, ATTENTION | {"down_proj"}, {0, 1}),
        ({"target_modules": r".*\.(q|v)_proj"}, {"q_proj", "v_proj"}, {0, 1}),
        ({"target_modules": r"model\.layers\.1\..*_proj"}, ATTENTION | MLP, {1}),
        ({"exclude_modules": ["k_proj"]}, (ATTENTION | MLP) - {"k_proj"}, {0, 1}),
        ({"exclude_modules": "attention"}, MLP, {0, 1}),
        ({"exclude_modules": r".*layers\.0\..*"}, ATTENTION | MLP, {1}),
        ({"layers_to_transform": [1]}, ATTENTION | MLP, {1}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}, {"q_proj"}, {0, 1}),
    ],
)
def test_the_modules_that_are_named_are_adapted_and_no_others(
    settings: dict[str, Any], expected: set[str], layers: set[int]
) -> None:
    _, on = adapted("llama", **settings)
    assert names(on) == expected
    assert {int(path.split(".")[2]) for path in on} == layers
    assert len(on) == len(expected) * len(layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_are_all_linear_layers_of_every_family(family: str) -> None:
    base = adapted(family)[0].unload()
    attention, mlp = shapes_of(base).targets("attention"), shapes_of(base).targets("mlp")
    assert attention | mlp == shapes_of(base).targets("all-linear")
    assert not attention & mlp


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "mlp", "layers_to_transform": [1]},
        {"exclude_modules": ["k_proj"], "rank_pattern": {"q_proj": 8}},
        PATTERNS,
        PATTERNS | {"use_rslora": True},
    ],
)
def test_the_plan_counts_what_is_trained(
    settings: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    run = tiny_run(tiny_model(), rows, tmp_path / "run", adapter=settings)
    planned = planner_of(run, "8GiB").forecast(run)
    model, _ = adapted("llama", **settings)
    assert planned.trainable == count_parameters(model)["trainable"]
    assert planned.total == count_parameters(model)["total"]


def test_ranks_and_scales_are_those_of_plain_peft() -> None:
    model, on = adapted("llama", lora_alpha=8, **PATTERNS)
    for path in on:
        layer = model.get_base_model().get_submodule(path)
        rank = rank_of(path, 4, PATTERNS["rank_pattern"].items())
        alpha = 30 if "v_proj" in path else 5 if "layers.0.mlp.gate" in path else 8
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == alpha / rank
    assert {layer.r["default"] for layer in model.modules() if hasattr(layer, "lora_A")} == {2, 3, 4, 7}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("r", [4, 20])
def test_the_fused_engine_computes_patterns_as_the_reference_engine_does(family: str, r: int) -> None:
    patterns = PATTERNS
    if family == "phi3":  # which has one matrix for q, k and v, and one for gate and up
        patterns = {"rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"gate_up_proj": 30}}
    model, batch = model_of(family, r=r, **patterns), batch_of()
    wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
    loss, found = gradients(FusedEngine(model), model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)


def test_several_ranks_have_the_dropout_of_one() -> None:
    """Each matrix's gradient under dropout is the slope of the loss."""
    model, batch = model_of("llama", lora_dropout=0.3, **PATTERNS), batch_of()
    engine = FusedEngine(model)

    def loss() -> float:
        torch.manual_seed(5)  # of the masks
        return engine.forward_backward(batch, LIKELIHOOD).loss.item()

    loss()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: p.grad.clone() for name, p in parameters.items()}
    for name in ("0.self_attn.q_proj.lora_A", "0.self_attn.v_proj.lora_B", "1.mlp.up_proj.lora_A"):
        parameter, slope = next((p, found[n]) for n, p in parameters.items() if name in n)
        direction = slope / slope.norm()
        parameter.data += 0.01 * direction
        above = loss()
        parameter.data -= 0.02 * direction
        below = loss()
        parameter.data += 0.01 * direction
        assert (above - below) / 0.02 == pytest.approx(slope.norm().item(), rel=0.03), name


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_a_run_with_patterns_resumes_merges_and_is_certified(
    engine: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    settings = PATTERNS | {"exclude_modules": ["o_proj"]}

    def run(name: str) -> veneer.Run:
        train = {"engine": engine, "save_steps": 2}
        return tiny_run(tiny_model(), rows, tmp_path / name, adapter=settings, train=train)

    veneer.train(run("whole"))
    with pytest.raises(Interrupted):
        veneer.train(run("cut"), listeners=[StopAt(3)])
    veneer.train(run("cut"), resume=True)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")

    veneer.merge(str(tmp_path / "whole"), tmp_path / "merged", dtype="float32")

    def load(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    ids = torch.arange(24)[None] + 3
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(tiny_model()), str(tmp_path / "whole" / "adapter")).eval()(ids).logits
        assert (expected - load(tiny_model())(ids).logits).abs().max() > 1e-3, "the adapter changes the model"
        assert (load(tmp_path / "merged")(ids).logits - expected).abs().max() <= 1e-4
    certificate, _ = veneer.certify(str(tmp_path / "merged"), str(tmp_path / "whole"), rows=4)
    assert certificate.passed, certificate
    card = (tmp_path / "whole" / "adapter" / "README.md").read_text()
    assert r"| ranks that differ | q_proj: 2, layers\.1\.mlp\..\*: 7, up_proj: 3 |" in card
    assert "| adapted modules | all-linear, without o_proj |" in card
    assert "vLLM does not take this adapter as it is (modules of several ranks" in card


def test_training_starts_from_an_adapter_with_the_same_patterns_alone(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    first = tiny_run(tiny_model(), rows, tmp_path / "first", adapter=PATTERNS)
    veneer.train(first)
    start = {"adapter": str(tmp_path / "first")}
    veneer.train(tiny_run(tiny_model(), rows, tmp_path / "second", adapter=PATTERNS, model=start))
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0]
    with pytest.raises(UserError, match="it was trained with rank_pattern = "):
        veneer.train(tiny_run(tiny_model(), rows, tmp_path / "third", model=start))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": r".*\.(q|v)_prj"}, r"target_modules: `.*` matches no module of this model; nearest: "),
        ({"target_modules": ["q_prj"]}, "target_modules: `q_prj` matches no module of this model; nearest: q_proj"),
        ({"exclude_modules": ["q_prj"]}, "exclude_modules: `q_prj` matches no module that is adapted; nearest: q_proj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_proj"]}, "exclude_modules: `k_proj` matches no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules: it leaves no module"),
        ({"layers_to_transform": [1, 2]}, "layers_to_transform: layer 2 has no module"),
        ({"rank_pattern": {"q_prj": 8}}, "rank_pattern: `q_prj` matches no module that is adapted; nearest: q_proj"),
        ({"alpha_pattern": {"q_prj": 8}}, "alpha_pattern: `q_prj` matches no module that is adapted; nearest: q_proj"),
        ({"target_modules": ["v_proj"], "rank_pattern": {"q_proj": 8}}, "rank_pattern: `q_proj` matches no module"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adapted("llama", **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": "q_proj"}, "target_modules = 'q_proj': is a name; names go in a list"),
        ({"target_modules": "(q_proj"}, "is no regular expression: missing )"),
        ({"exclude_modules": "*.q_proj"}, "is no regular expression: nothing to repeat"),
        ({"exclude_modules": []}, "adapter.exclude_modules"),
        ({"layers_to_transform": [-1]}, "adapter.layers_to_transform"),
        ({"layers_to_transform": 3}, "write a list of numbers from 0"),
        ({"rank_pattern": {"q_proj": 0}}, "adapter.rank_pattern"),
        ({"rank_pattern": {"(q_proj": 8}}, "`(q_proj` is no regular expression"),
        ({"alpha_pattern": {"q_proj": 0}}, "adapter.alpha_pattern"),
    ],
)
def test_what_is_no_pattern_is_refused_by_the_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        veneer.Run(model={"base": "x"}, data={"train": "y.jsonl"}, adapter=settings)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("attention", {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"}),
        ("mlp", {"intermediate.dense", "output.dense"}),
    ],
)
def test_parts_of_an_encoder_whose_layers_are_named_as_bert_s(part: str, expected: set[str], tmp_path: Path) -> None:
    base = transformers.AutoModel.from_pretrained(save_tiny_base("bert", tmp_path / "base"))
    found = classifier_shapes(base, []).targets(Adapter(target_modules=part))
    assert found == {f"encoder.layer.{layer}.{name}" for layer in (0, 1) for name in expected}
