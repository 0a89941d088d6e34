"""The fused engine on a GPU: its kernels against their twins, its gradients against float32."""

from dataclasses import replace

import pytest
import torch

from tests.support.engines import COVERED, batch_of, gradients, model_of, worst
from tests.support.exactness import BATCHES, LENGTHS, ratios, tiny_errors
from tests.support.preference import Preference, pairs, step
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.reference import ReferenceEngine
from veneer.kernels import nf4

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", COVERED)
def test_float32_on_the_gpu_is_the_reference(family: str) -> None:
    model, batch = model_of(family).cuda(), batch_of()
    wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
    loss, found = gradients(FusedEngine(model), model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    assert worst(found, wanted)[0] < 5e-3, worst(found, wanted)


@pytest.mark.parametrize("family", COVERED)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_bfloat16_errs_at_most_twice_as_much_as_peft(family: str, lengths: tuple[int, ...]) -> None:
    """One batch is one draw of what rounding may do to a matrix, and now and then it is twice another. Over six models
    and batches together, no matrix's error may be."""
    batches = [tiny_errors(family, lengths, seed, "cuda") for seed in range(BATCHES)]
    for right, by_peft, found in (batch.losses for batch in batches):
        assert abs(found - right) <= max(2 * abs(by_peft - right), 2e-3 * right)
    assert {name: ratio for name, ratio in ratios(batches).items() if ratio > 2} == {}


def test_four_bit_weights_become_what_bitsandbytes_makes_of_them() -> None:
    import bitsandbytes as bnb

    for double in (True, False):
        shapes = [(192, 576), (64, 576), (320, 576)]
        weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        packed = [
            bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=double).cuda()
            for w in weights
        ]
        out = torch.full((576, 600), float("nan"), device="cuda", dtype=torch.bfloat16)
        nf4.dequantize(nf4.table_of([nf4.PackedNF4.of(p) for p in packed]), out[:, :576])
        wanted = torch.cat([bnb.functional.dequantize_4bit(p.data, p.quant_state) for p in packed])
        torch.testing.assert_close(out[:, :576], wanted, rtol=1e-2, atol=1e-6)
        assert (out[:, :576] == wanted).float().mean() > 0.999


def test_replayed_passes_are_equal_bit_for_bit() -> None:
    model = model_of("llama", changes={"hidden_size": 128}).cuda().bfloat16()
    plain, recording = FusedEngine(model, graphs=False), FusedEngine(model)
    for lengths, seed in (((64, 64), 1), ((64, 64), 1), ((64, 64), 2), ((64, 30), 3), ((64, 64), 1)):
        batch = batch_of(lengths, seed=seed)
        loss, wanted = gradients(plain, model, batch)
        replayed_loss, found = gradients(recording, model, batch)
        assert loss == replayed_loss
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert torch.equal(plain.token_logprobs(batch), recording.token_logprobs(batch))


@pytest.mark.parametrize("lengths", [(64, 64), (64, 30), (40, 37, 60, 5)])
def test_a_preference_replayed_is_the_launched_one_bit_for_bit(lengths: tuple[int, ...]) -> None:
    """Coefficients are made and used within the recording, from what each batch carries."""
    model = model_of("llama", changes={"hidden_size": 128}).cuda().bfloat16()
    plain, recording = FusedEngine(model, graphs=False), FusedEngine(model)
    for seed in (1, 1, 2, 3):
        batches = [pairs(lengths, seed=seed).scaled(0.5)]
        launched, wanted = step(plain, model, batches, Preference())
        replayed, found = step(recording, model, batches, Preference())
        assert replayed == launched
        assert replayed.weight == len(lengths) / 2
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_preferences_gradient_on_the_gpu_is_the_references() -> None:
    model, batches = model_of("llama").cuda(), [pairs().scaled(0.5)]
    wanted_output, wanted = step(ReferenceEngine(model), model, batches, Preference())
    output, found = step(FusedEngine(model), model, batches, Preference())
    assert output.loss.item() == pytest.approx(wanted_output.loss.item(), rel=1e-4)
    assert worst(found, wanted)[0] < 5e-3, worst(found, wanted)


WIDE = {  # as many heads as an 8B model has: with few, the order of what is added hardly ever differs
    "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("lengths", [(2048,) * 4, (1000,) * 3, (8192,), (1500, 500), (700, 3000, 100), (150,) * 30])
def test_long_documents_replayed_or_made_again(lengths: tuple[int, ...]) -> None:
    model, batch = model_of("llama", changes=WIDE).cuda().bfloat16(), batch_of(lengths)
    plain, none, recording, roomy, narrow = (
        FusedEngine(model, graphs=False),
        FusedEngine(model, True, graphs=False),
        FusedEngine(model),
        FusedEngine(model, graphs=False),
        FusedEngine(model, graphs=False),
    )
    roomy.apply(replace(roomy.placement, workspace_bytes=2**40))
    narrow.apply(replace(narrow.placement, workspace_bytes=0))
    loss, wanted = gradients(plain, model, batch)
    for engine in (plain, plain, none, roomy, narrow, recording, recording, recording):
        found_loss, found = gradients(engine, model, batch)
        assert found_loss == loss
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), worst(found, wanted)


def test_in_float32_batches_of_one_shape_and_other_lengths_are_not_taken_for_one_another() -> None:
    model = model_of("llama").cuda()
    plain, recording = FusedEngine(model, graphs=False), FusedEngine(model)
    for lengths in ((64, 30), (64, 30), (64, 30), (50, 44), (60, 34)):
        batch = batch_of(lengths)
        loss, wanted = gradients(plain, model, batch)
        found_loss, found = gradients(recording, model, batch)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rank", [16, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_any_rank_run_at_any_length(dtype: torch.dtype, rank: int, dropout: float) -> None:
    """Kernels of higher ranks and of more tokens need more shared memory than a GPU may have."""
    changes = {"hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 8192}
    model = model_of("llama", changes=changes, r=rank, lora_dropout=dropout).cuda()
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(dtype)
    engine = FusedEngine(model, True, graphs=False)
    for lengths in ((300, 70), (1024,) * 8):
        _, found = gradients(engine, model, batch_of(lengths))
        assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
