"""A family and an adapter method are one description each: a made-up one of either is followed everywhere."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import veneer
from tests.support.engines import batch_of, gradients, worst
from tests.support.plans import planner_of
from tests.support.runs import losses, tiny_run, write_rows
from tests.support.tiny import FAMILIES as TINY
from tests.support.tiny import save_tiny_model
from veneer.config import Adapter, Model
from veneer.engine.fused.decoder import NotCoveredError
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.reference import ReferenceEngine
from veneer.engine.temporary import fill_zeros
from veneer.model.adapters import METHODS, find_method
from veneer.model.adapters.lora import LORA, low_rank
from veneer.model.adapters.method import AdapterMethod
from veneer.model.attach import attach, count_parameters
from veneer.model.families import FAMILIES
from veneer.model.families.llama import LLAMA
from veneer.model.known import known_shape, smaller_siblings
from veneer.planning.base import PlannedModel
from veneer.planning.forecast import Forecast
from veneer.release.gguf.tensor_layout import TensorLayout

# Llama's decoder under another name, with a window in three of four layers.
CWM = ("CwmConfig", TINY["llama"][1] | {"head_dim": 16, "sliding_window": 16})
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 384}


def forecast(run: veneer.Run) -> Forecast:
    """Of a run on a GPU of 8 GiB; nothing is loaded."""
    return planner_of(run, "8GiB").forecast(run)


@pytest.fixture
def cwm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family, registered by one description."""
    series = {"llama-cwm-1b": SHAPE, "llama-cwm-7b": SHAPE}
    monkeypatch.setitem(FAMILIES, "cwm", replace(LLAMA, model_type="cwm", title="CWM", published=(series,)))


def model_of_cwm() -> Any:
    config = transformers.CwmConfig(**(CWM[1] | {"attn_implementation": "eager"}))
    torch.manual_seed(0)
    model = attach(transformers.AutoModelForCausalLM.from_config(config).eval(), Adapter(r=4, lora_alpha=12), 0)
    fill_zeros(model)
    return model


def test_a_family_without_a_description_is_not_covered() -> None:
    with pytest.raises(NotCoveredError, match="the architecture cwm"):
        FusedEngine(model_of_cwm())


@pytest.mark.usefixtures("cwm")
def test_the_fused_engine_computes_a_described_family() -> None:
    model, batch = model_of_cwm(), batch_of()
    loss, found = gradients(FusedEngine(model), model, batch)
    expected, wanted = gradients(ReferenceEngine(model), model, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert worst(found, wanted)[0] < 1e-4


@pytest.mark.usefixtures("cwm")
def test_plans_and_gguf_follow_a_described_family(tmp_path: Path) -> None:
    save_tiny_model(CWM, tmp_path / "base")
    found = forecast(tiny_run(tmp_path / "base", "-", tmp_path / "run", train={"engine": "fused"}))
    assert found.engine == "fused"
    assert known_shape("meta-llama/Llama-CWM-7B") == ("cwm", SHAPE)
    assert smaller_siblings("meta-llama/Llama-CWM-7B") == ["meta-llama/Llama-CWM-1B"]

    layout = TensorLayout(transformers.CwmConfig(**CWM[1]), "a base")
    assert layout.name("model.layers.1.self_attn.q_proj.weight") == "blk.1.attn_q.weight"
    weight = torch.arange(64.0)[:, None].expand(64, 64)
    transform = layout.transform("model.layers.1.self_attn.q_proj.weight")
    assert transform is not None
    assert transform(weight)[:4, 0].tolist() == [0, 8, 1, 9], "rotary pairs are neighbours in llama.cpp"
    assert layout.metadata()["llama.context_length"] == 16, "llama.cpp's Llama has no window"


class _Scaled(torch.nn.Module):
    """Stands in for PEFT's (IA)^3 on a linear layer."""

    def __init__(self, base_layer: Any, outputs: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ia3_l = torch.nn.Parameter(torch.empty(outputs, 1, device="meta"))

    def forward(self, x: torch.Tensor) -> Any:
        result = self.base_layer(x)
        return (result * self.ia3_l.flatten()).to(result.dtype)


def _configure(adapter: Adapter, targets: str | list[str]) -> Any:
    from peft import IA3Config

    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[])


IA3 = AdapterMethod(
    name="(IA)^3",
    peft_type="IA3",
    applies=lambda options: True,  # every run of the test asks for it
    configure=_configure,
    stand_in=lambda base_layer, inputs, outputs, r, dropout: _Scaled(base_layer, outputs),
)


@pytest.fixture
def ia3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method, registered by one description."""
    monkeypatch.setattr("veneer.model.adapters.METHODS", (IA3, *METHODS))


@pytest.mark.usefixtures("ia3")
def test_a_described_method_is_planned_trained_and_merged(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    save_tiny_model(TINY["llama"], tmp_path / "base")
    data, targets = write_rows(tmp_path / "rows.jsonl", rows), {"target_modules": ["q_proj", "v_proj"]}
    run = tiny_run(
        tmp_path / "base", data, tmp_path / "run", adapter=targets, train={"learning_rate": 0.1, "max_steps": 8}
    )
    planned = forecast(run)
    assert planned.trainable == 2 * (64 + 32), "a number for each output of both projections in two layers"
    assert planned.engine_reason == "the fused engine does not cover adapters of the method (IA)^3"

    veneer.train(run)
    seen = losses(tmp_path / "run")
    assert seen[-1] < seen[0]

    veneer.merge(str(tmp_path / "run"), tmp_path / "merged", dtype="float32")
    import peft

    def load(folder: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32).eval()

    adapted = peft.PeftModel.from_pretrained(load("base"), str(tmp_path / "run" / "adapter")).eval()
    ids = torch.arange(24)[None] + 3
    with torch.no_grad():
        expected, base, found = (model(ids).logits for model in (adapted, load("base"), load("merged")))
    assert (expected - base).abs().max() > 1e-3, "the adapter changes the model"
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.usefixtures("ia3")
def test_the_fused_engine_leaves_a_described_method_to_the_reference_engine() -> None:
    base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY["llama"][1]))
    model = attach(base, Adapter(target_modules=("q_proj",)), 0)
    assert find_method(model.peft_config["default"]) is IA3
    with pytest.raises(NotCoveredError, match=re.escape("layers.0.self_attn.q_proj: an adapter other than")):
        FusedEngine(model)


@pytest.mark.parametrize("adapter", [Adapter(r=4), Adapter(r=4, use_rslora=True)])
def test_a_method_says_of_itself_what_peft_makes_of_it(adapter: Adapter) -> None:
    base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY["llama"][1]))
    method = find_method(adapter)
    model = attach(base, adapter, 0)
    assert find_method(model.peft_config["default"]) is method
    shapes = PlannedModel(Model(base="HuggingFaceTB/SmolLM2-135M"), "it is a test").shapes
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {method.learns_first(name) for name, p in trained.items() if not p.any()} == {True}
    assert {method.learns_first(name) for name, p in trained.items() if p.any()} == {False}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    factors = low_rank(layer)
    assert factors is not None
    assert method.is_low_rank
    assert factors.scale == method.scale(adapter)
    assert method.sizes(shapes, frozenset({"model.layers.0.self_attn.q_proj"}), 4) == [4 * 576, 4 * 576]
    sizes = [(p.shape[0], p.shape[1]) for p in method.stand_in(None, 64, 32, 4, 0.0).parameters()]
    assert sizes == [(4, 64), (32, 4)]
    assert sum(p.numel() for p in trained.values()) == count_parameters(model)["trainable"]


def test_the_plain_method_comes_last() -> None:
    assert METHODS[-1] is LORA, "it applies to all settings"
