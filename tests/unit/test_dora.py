"""DoRA: the fused engine computes what PEFT's modules do, and a run goes from its plan to its certificate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import veneer
from tests.support.engines import COVERED, batch_of, gradients, model_of, worst
from tests.support.plans import planner_of
from tests.support.runs import StopAt, losses, some_rows, tiny_run, write_rows
from veneer.config import Adapter, Interrupted, UserError
from veneer.data.batch import Batch
from veneer.engine.fused.block import ACTIVATIONS
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.policy import tightest, uniform
from veneer.engine.interface import document_losses
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.model.adapters.dora import norms_kept
from veneer.model.attach import attach, count_parameters
from veneer.training.job import TrainingJob


def dora_of(family: str, **adapter: Any) -> Any:
    """A tiny model whose magnitudes are not the norms that they begin as."""
    model = model_of(family, method="dora", **adapter)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("settings", [{}, {"r": 40, "use_rslora": True}, {"rank_pattern": {".*(k|o|up)_proj": 7}}])
@pytest.mark.parametrize("family", COVERED)
def test_losses_and_gradients_are_the_references(family: str, settings: dict[str, Any]) -> None:
    if family == "phi3" and "rank_pattern" in settings:
        settings = {"rank_pattern": {"o_proj": 7}}
    model, batch = dora_of(family, **settings), batch_of()
    wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
    wanted_losses = document_losses(ReferenceEngine(model), batch)
    results = []
    for keep in (ACTIVATIONS, (), ("qkv", "mid")):
        engine = FusedEngine(model)
        engine.apply(uniform(engine.blocks, keep))
        results.append(gradients(engine, model, batch))
    assert results[0][0] == pytest.approx(wanted_loss, rel=1e-5)
    assert worst(results[0][1], wanted)[0] < 1e-4, worst(results[0][1], wanted)
    torch.testing.assert_close(document_losses(engine, batch), wanted_losses, rtol=1e-5, atol=1e-5)
    for loss, found in results[1:]:  # what is kept changes no bit
        assert loss == results[0][0]
        assert all(torch.equal(found[name], results[0][1][name]) for name in found)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj"], ["k_proj", "up_proj"]])
def test_any_subset_of_the_linears_is_adapted(targets: list[str]) -> None:
    model, batch = dora_of("qwen2", target_modules=targets), batch_of()
    wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
    loss, found = gradients(FusedEngine(model), model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_on_the_host_changes_no_bit(family: str) -> None:
    model, batch = dora_of(family), batch_of()
    results = []
    places: list[Any] = [lambda blocks: uniform(blocks, ()), lambda b: tightest(b, ("x", "attention"), False)]
    for place in places:
        engine = FusedEngine(model)
        engine.apply(place(engine.blocks))
        results.append(gradients(engine, model, batch)[1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_mlp_in_pieces_is_the_mlp(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = dora_of("llama", lora_dropout=dropout), batch_of((150, 80, 21))
    torch.manual_seed(5)  # of the masks
    loss, wanted = gradients(FusedEngine(model), model, batch)
    monkeypatch.setattr("veneer.engine.fused.block.MLP_TOKENS", 100)
    for checkpointing in (False, True):
        torch.manual_seed(5)
        in_pieces, found = gradients(FusedEngine(model, checkpointing), model, batch)
        assert in_pieces == pytest.approx(loss, rel=1e-6)
        assert worst(found, wanted)[0] < 1e-5, worst(found, wanted)


def norms_of(engine: FusedEngine) -> list[torch.Tensor]:
    groups = [group for block in engine.blocks for group in block.groups]
    return [group.scale.factor_N.clone() for group in groups if group.scale is not None]


def test_norms_are_computed_once_a_step_and_where_adapters_change() -> None:
    model, batch = dora_of("llama"), batch_of()
    engine = FusedEngine(model)
    engine.forward_backward(batch.scaled(0.01), LIKELIHOOD)
    before = norms_of(engine)
    for group in (group for block in engine.blocks for group in block.groups):
        assert group.scale is not None
        group.scale.factor_N.mul_(2)
    engine.forward_backward(batch.scaled(0.01), LIKELIHOOD)  # the second micro-batch of a step
    assert all(torch.equal(found, 2 * wanted) for found, wanted in zip(norms_of(engine), before, strict=True))
    model.zero_grad()
    engine.forward_backward(batch.scaled(0.01), LIKELIHOOD)
    assert all(torch.equal(found, wanted) for found, wanted in zip(norms_of(engine), before, strict=True))
    engine.master.data[: engine.master.numel() // 2] *= 1.5
    losses_now = document_losses(engine, batch)
    assert any(not torch.equal(found, wanted) for found, wanted in zip(norms_of(engine), before, strict=True))
    torch.testing.assert_close(losses_now, document_losses(ReferenceEngine(model), batch), rtol=1e-5, atol=1e-5)


def test_micro_batches_add_up_to_the_step_of_the_whole() -> None:
    model, batch = dora_of("llama"), batch_of()
    engine = FusedEngine(model)
    _, wanted = gradients(engine, model, batch)
    model.zero_grad()
    start = 0
    for length in batch.lengths:
        part = slice(start, start + length)
        alone = Batch(batch.ids_T[part], batch.targets_T[part], batch.weights_T[part], (length,), 0, 0.0)
        engine.forward_backward(alone.scaled(0.01), LIKELIHOOD)
        start += length
    assert worst({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, wanted)[0] < 1e-5


def test_without_the_adapter_it_is_the_base() -> None:
    model, batch = dora_of("qwen2"), batch_of()
    engine = FusedEngine(model)
    with_it = document_losses(engine, batch)
    with engine.adapter_off():
        found = document_losses(engine, batch)
    plain = ReferenceEngine(model)
    with plain.adapter_off():
        wanted = document_losses(plain, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert with_it != pytest.approx(wanted, rel=1e-4)
    assert document_losses(engine, batch) == with_it


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(48).reshape(2, 24) + 3).logits
    return found


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_a_run_is_planned_resumed_verified_merged_and_certified(
    engine: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base, rows = tiny_model(), write_rows(tmp_path / "rows.jsonl", some_rows())

    def run(name: str) -> veneer.Run:
        adapter = {"method": "dora", "rank_pattern": {"q_proj": 6}}
        train = {"save_steps": 2, "learning_rate": 1e-3, "gradient_accumulation_steps": 2, "engine": engine}
        return tiny_run(base, rows, tmp_path / name, adapter=adapter, train=train)

    planned = planner_of(run("whole"), "8GiB").forecast(run("whole"))
    assert (
        planned.trainable == count_parameters(attach(loaded(base), run("whole").adapter or Adapter(), 0))["trainable"]
    )
    assert planned.engine == engine
    job = TrainingJob(run("whole"))
    job.fit()
    with pytest.raises(Interrupted):
        veneer.train(run("cut"), listeners=[StopAt(3)])
    veneer.train(run("cut"), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    live = logits_of(job.model.eval())
    saved = logits_of(PeftModel.from_pretrained(loaded(base), str(tmp_path / "whole" / "adapter")).eval())
    torch.testing.assert_close(saved, live, rtol=0, atol=1e-5)
    veneer.merge(str(tmp_path / "whole"), tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(logits_of(loaded(tmp_path / "merged")), live, rtol=0, atol=1e-4)
    certificate, _ = veneer.certify(str(tmp_path / "merged"), str(tmp_path / "whole"), rows=4)
    assert certificate.passed, certificate


def test_verify_passes(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    run = tiny_run(tiny_model(), rows, tmp_path / "run", adapter={"method": "dora"}, train={"engine": "fused"})
    verified = veneer.verify(run)
    assert verified.passed, verified


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "DoRA takes linear layers, and model.embed_tokens is an emb"),
        ({"init_lora_weights": "pissa"}, "begins plain LoRA alone"),
    ],
)
def test_what_it_does_not_take_is_refused(
    adapter: dict[str, Any], said: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    run = tiny_run(tiny_model(), rows, tmp_path / "run", adapter={"method": "dora"} | adapter)
    with pytest.raises(UserError, match=said):
        planner_of(run, "8GiB").forecast(run)
    with pytest.raises(UserError, match=said):
        attach(loaded(tiny_model()), run.adapter or Adapter(), 0)
    with pytest.raises(UserError, match=said):
        veneer.train(run)


@pytest.mark.parametrize(("before", "now"), [("lora", "dora"), ("dora", "lora")])
def test_training_goes_on_from_an_adapter_of_the_same_method_alone(
    before: str, now: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())

    def run(name: str, method: str, **model: Any) -> veneer.Run:
        named = {"base": str(tiny_model()), "dtype": "float32"} | model
        return tiny_run(tiny_model(), rows, tmp_path / name, adapter={"method": method}, model=named)

    veneer.train(run("first", before))
    with pytest.raises(UserError, match=rf"set adapter\.method: {before}"):
        veneer.train(run("second", now, adapter=str(tmp_path / "first")))
    veneer.train(run("third", before, adapter=str(tmp_path / "first")))
    assert losses(tmp_path / "third")[0] < losses(tmp_path / "first")[0]


def test_the_magnitudes_of_a_bare_adapter_are_the_norms_of_the_base() -> None:
    model = model_of("llama", method="dora")
    settings = Adapter(method="dora", r=4)
    assert settings.method == "dora"
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            layer = model.get_submodule(name.split(".lora_magnitude_vector")[0])
            torch.testing.assert_close(parameter.data, layer.get_base_layer().weight.norm(dim=1))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_generation_computes_norms_once_and_what_peft_computes(family: str) -> None:
    model = dora_of(family).eval()
    wanted = logits_of(model)
    with norms_kept(model):
        found = logits_of(model)
        layers = [module for module in model.modules() if hasattr(module, "lora_variant")]
        assert all(layer.merged for layer in layers), "PEFT's own forward adds nothing"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(model), wanted, rtol=0, atol=0)
    with model.disable_adapter():
        base = logits_of(model)
        with norms_kept(model):
            assert torch.equal(logits_of(model), base)
    assert not torch.allclose(wanted, base, atol=1e-3)
