"""DoRA on a GPU: gradients against float32, and steps that are kept, recomputed, offloaded and replayed."""

from typing import Any

import pytest
import torch

from tests.support.engines import COVERED, batch_of, gradients, model_of, worst
from tests.support.exactness import BATCHES, LENGTHS, ratios, tiny_errors
from veneer.engine.fused.block import ACTIVATIONS
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.policy import tightest, uniform
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine

pytestmark = pytest.mark.gpu


def dora_of(family: str, **adapter: Any) -> Any:
    model = model_of(family, changes={"hidden_size": 128}, method="dora", **adapter)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    return model.cuda()


@pytest.mark.parametrize("settings", [{}, {"r": 40}, {"lora_dropout": 0.3}])
@pytest.mark.parametrize("family", COVERED)
def test_float32_on_the_gpu_is_the_reference(family: str, settings: dict[str, Any]) -> None:
    model, batch = dora_of(family, **settings), batch_of()
    engine = FusedEngine(model)
    with engine.dropout_off():
        loss, found = gradients(engine, model, batch)
    model.eval()  # no dropout in the reference engine either
    reference = ReferenceEngine(model)
    with reference.dropout_off():
        wanted_loss, wanted = gradients(reference, model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    assert worst(found, wanted)[0] < 5e-3, worst(found, wanted)


@pytest.mark.parametrize("family", COVERED)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_bfloat16_errs_at_most_twice_as_much_as_peft(family: str, lengths: tuple[int, ...]) -> None:
    batches = [tiny_errors(family, lengths, seed, "cuda", method="dora") for seed in range(BATCHES)]
    for right, by_peft, found in (batch.losses for batch in batches):
        assert abs(found - right) <= max(2 * abs(by_peft - right), 2e-3 * right)
    assert {name: ratio for name, ratio in ratios(batches).items() if ratio > 2} == {}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_kept_recomputed_and_offloaded_steps_are_equal_bit_for_bit(family: str) -> None:
    model, batch = dora_of(family).bfloat16(), batch_of((128, 128))
    places: list[Any] = [lambda blocks: uniform(blocks, ACTIVATIONS), lambda blocks: uniform(blocks, ())]
    if family != "gemma2":  # the tensors of FlexAttention's backward are not offloaded
        places.append(lambda blocks: tightest(blocks, ("x", "attention"), False))
    results = []
    for place in places:
        engine = FusedEngine(model, graphs=False)
        engine.apply(place(engine.blocks))
        results.append(gradients(engine, model, batch))
    for loss, found in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(found[name], results[0][1][name]) for name in found)


def test_replayed_steps_of_several_micro_batches_are_equal_bit_for_bit() -> None:
    """The first pass of a step computes the norms, and the others read them; each kind is recorded by itself."""
    models = [dora_of("llama").bfloat16() for _ in range(2)]
    engines = [FusedEngine(model, graphs=recording) for model, recording in zip(models, (False, True), strict=True)]
    for step in range(4):
        batches = [batch_of((128, 128), seed=10 * step + n).scaled(0.01) for n in range(3)]
        results = []
        for engine, model in zip(engines, models, strict=True):
            model.zero_grad(set_to_none=True)
            losses = [engine.forward_backward(batch, LIKELIHOOD).loss.item() for batch in batches]
            assert engine.master.grad is not None
            results.append((losses, engine.master.grad.clone()))
            engine.master.data -= 0.01 * torch.sign(engine.master.grad)
        assert results[0][0] == results[1][0]
        assert torch.equal(results[0][1], results[1][1])
