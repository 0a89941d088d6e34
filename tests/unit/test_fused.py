"""The fused engine computes what the reference engine computes: losses and every adapter's gradient."""

from typing import Any

import pytest
import torch
import transformers

from tests.tiny import FAMILIES
from veneer.config import Adapter, Train
from veneer.data import Batch
from veneer.engine import ReferenceEngine
from veneer.engine.fused import FusedEngine, NotCoveredError
from veneer.engine.fused.block import TENSORS
from veneer.model import attach
from veneer.train.optimizer import build_optimizer

COVERED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")


def model_of(family: str, seed: int = 0, changes: dict[str, Any] | None = None, **adapter: Any) -> Any:
    """A tiny model whose adapters, biases and norms are not what they begin as, so that each one matters."""
    name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**(settings | {"attn_implementation": "eager"} | (changes or {})))
    base = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter_name, parameter in base.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model = attach(base, Adapter(**({"r": 4, "lora_alpha": 12} | adapter)), seed)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def batch_of(lengths: tuple[int, ...] = (37, 5, 21), vocabulary: int = 384, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(3, vocabulary, (total,), generator=generator)
    targets = torch.where(torch.rand(total, generator=generator) < 0.6, ids.roll(-1), -100)
    weights = torch.where(targets >= 0, torch.rand(total, generator=generator) + 0.5, 0.0)
    return Batch(ids, targets, weights, lengths, int((targets >= 0).sum()), float(weights.sum()))


def gradients(engine: Any, model: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = engine.forward_backward(batch, 0.01).item()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    return max((((found[n] - wanted[n]).norm() / wanted[n].norm()).item(), n) for n in wanted)


@pytest.mark.parametrize("family", COVERED)
def test_losses_and_gradients_are_the_references(family: str) -> None:
    model, batch = model_of(family), batch_of()
    wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
    wanted_losses = ReferenceEngine(model).losses(batch)
    engine = FusedEngine(model)
    loss, found = gradients(engine, model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)
    torch.testing.assert_close(engine.losses(batch), wanted_losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj"], ["gate_proj"], ["k_proj", "up_proj"]]
)
def test_any_subset_of_the_linears_is_adapted(targets: list[str]) -> None:
    model, batch = model_of("qwen2", target_modules=targets, use_rslora=True), batch_of()
    wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
    loss, found = gradients(FusedEngine(model), model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)


@pytest.mark.parametrize("family", COVERED)
def test_what_is_kept_changes_no_bit(family: str) -> None:
    batch = batch_of()
    results = []
    for keep in (TENSORS, (), ("attention",), ("qkv", "mid"), ("mid", "gate_up")):
        model = model_of(family)
        results.append(gradients(FusedEngine(model, frozenset(keep)), model, batch))
    for loss, found in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(found[n], results[0][1][n]) for n in found)


def test_packed_equals_unpacked() -> None:
    model, batch = model_of("llama"), batch_of()
    engine = FusedEngine(model)
    loss, found = gradients(engine, model, batch)
    model.zero_grad()
    total, start = 0.0, 0
    for length in batch.lengths:
        part = slice(start, start + length)
        alone = Batch(batch.ids_T[part], batch.targets_T[part], batch.weights_T[part], (length,), 0, 0.0)
        total += engine.forward_backward(alone, 0.01).item()
        start += length
    assert total == pytest.approx(loss, rel=1e-6)
    assert worst({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, found)[0] < 1e-5


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adamw_32bit"])
def test_one_launch_for_all_adapters_is_one_for_each(optim: str) -> None:
    """Sizes here are multiples of 256, and large enough that bitsandbytes keeps 8-bit states of them."""
    results = []
    for flat in (True, False):
        model = model_of(
            "llama", changes={"intermediate_size": 256, "hidden_size": 256, "num_key_value_heads": 4}, r=16
        )
        engine = FusedEngine(model)
        parameters = [engine.master] if flat else [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(parameters, Train(optim=optim, learning_rate=1e-2, weight_decay=0.1), "cpu")
        for seed in range(3):
            engine.forward_backward(batch_of(seed=seed), 0.01)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        results.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert worst(*results)[0] < 1e-6, worst(*results)


def test_a_model_that_is_not_covered_is_named() -> None:
    with pytest.raises(NotCoveredError, match="opt"):
        FusedEngine(model_of("opt"))
