"""The fused engine is predicted as it is: which runs get it, what it holds, what it keeps, how fast that makes it."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.dry_runs import config_of, step
from tests.support.engines import COVERED, model_of
from tests.support.plans import planner_of, run_of
from veneer.config import Run, Train, UserError
from veneer.engine import choose
from veneer.engine.dry_run import DryRun
from veneer.engine.fused.block import ACTIVATIONS
from veneer.engine.fused.cudnn import Call
from veneer.engine.fused.dry_run import _engine, run_layers_dry
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.policy import block_placement
from veneer.engine.trace import rounded
from veneer.kernels.rope import Heads
from veneer.model.shapes import Shapes, build, shapes_of
from veneer.planning.batch_shapes import Padded
from veneer.planning.forecast import Forecast
from veneer.planning.planner import Planner, step_of
from veneer.planning.target import device_named

GiB = 2**30
DEPTH = 6
RECOMPUTE = block_placement(())
DEQUANTIZED = block_placement(ACTIVATIONS, ("qkv", "o", "gate_up", "down"))


def small(family: str = "llama", **changes: Any) -> tuple[Any, Shapes]:
    """A model of several layers, whose shapes matter more than its 384 tokens."""
    config = config_of(family, DEPTH)
    for name, value in ({"hidden_size": 256, "intermediate_size": 512} | changes).items():
        setattr(config, name, value)
    return config, shapes_of(build(config, torch.bfloat16))


def fused(config: Any, shapes: Shapes, **changes: Any) -> DryRun:
    asked = step(shapes, **{"rows": 2, "length": 512, "trained": 900, "engine": "fused", "block": RECOMPUTE} | changes)
    return run_layers_dry(build(config, torch.bfloat16), asked, 1)


def forecast(gpu: str = "80GiB", base: str = "meta-llama/Meta-Llama-3-8B", **sections: Any) -> Forecast:
    run = run_of(base, **sections)
    return planner_of(run, gpu).forecast(run)


# Which engine


@pytest.mark.parametrize(
    ("sections", "engine", "reason"),
    [
        ({}, "fused", "covers this model"),
        ({"train": {"engine": "reference"}}, "reference", "asks for the reference engine"),
        ({"model": {"dtype": "float16"}}, "reference", "float16 compute"),
        ({"model": {"base": "openai-community/gpt2"}}, "reference", "the architecture gpt2"),
        ({"adapter": {"target_modules": ["q_proj", "embed_tokens"]}}, "reference", "an adapter on the embeddings"),
        ({"adapter": {"target_modules": ["q_proj", "lm_head"]}}, "reference", "an adapter on the head"),
    ],
)
def test_a_plan_says_which_engine_it_assumes(sections: dict[str, Any], engine: str, reason: str) -> None:
    run = run_of(**{"model": {"base": "meta-llama/Meta-Llama-3-8B"}} | sections)
    found = planner_of(run, "80GiB").forecast(run).as_dict()
    assert found["engine"] == engine
    assert reason in found["engine_reason"]


def test_off_cuda_the_reference_engine_is_predicted_unless_the_other_is_asked_for() -> None:
    run = run_of()
    target = replace(device_named("80GiB"), device="cpu")
    planner = Planner(planner_of(run, "80GiB").base, target)
    assert planner.forecast(run).engine == "reference"
    assert planner.forecast(run_of(train={"engine": "fused"})).engine == "fused"


def test_what_the_fused_engine_cannot_do_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"train\.engine = fused: .*gpt2"):
        forecast(base="openai-community/gpt2", train={"engine": "fused"})


def test_full_fine_tuning_is_the_reference_engines() -> None:
    run = run_of()
    assert planner_of(run, "80GiB").forecast_as(run, "full").engine == "reference"


# What it holds


@pytest.mark.parametrize("family", COVERED)
def test_what_it_holds_for_good_is_what_a_real_one_holds(family: str) -> None:
    model = model_of(family)
    engine = FusedEngine(model)
    replaced = [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]
    laid_out = sum(rounded(4 * module.weight.numel()) for module in replaced)
    tensors = [engine.master.data, engine._flat_grad, engine._scratch, engine._seed]
    for block in engine.blocks:
        for group in block.groups:
            assert group._resident is not None
            tensors += [group._resident, group._b_RN]
            tensors += [] if group._bias is None else [group._bias]
    real = sum(rounded(t.numel() * t.element_size()) for t in tensors) - laid_out

    config = config_of(family)
    config.use_cache = False
    shapes = shapes_of(build(config, torch.float32))
    asked = step(shapes, dtype=torch.float32, engine="fused", block=RECOMPUTE)
    prediction, held = _engine(build(config, torch.float32), asked)
    # Margins are wider on a GPU, for faster products: 64 columns, not 16.
    margins = 0
    for block, twin in zip(engine.blocks, prediction.blocks, strict=True):
        for group, other in zip(block.groups, twin.groups, strict=True):
            assert (group.used, group.stacked, group.inputs, group.outputs) == (
                other.used, other.stacked, other.inputs, other.outputs,
            )  # fmt: skip
            margins += rounded(4 * other.size) - rounded(4 * group.size)
    tables = sum(rounded(4 * table.numel()) for table in prediction._tables[0])
    assert sum(held.values()) == real + margins + tables


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("family", "rank"), [("llama", 8), ("qwen3", 256), ("gemma2", 8)])
def test_a_tensor_that_is_kept_adds_its_bytes(family: str, name: str, rank: int) -> None:
    config, shapes = small(family, **({} if family == "llama" else {"head_dim": 64}))
    least = fused(config, shapes, r=rank)
    more = fused(config, shapes, r=rank, block=block_placement({name}))
    asked = step(shapes, rows=2, length=512, engine="fused", block=RECOMPUTE, r=rank)
    blocks = _engine(build(config, torch.bfloat16), asked)[0].blocks
    # Seen at the loss: all blocks hold what they keep, and none is at work; the last one's stream is there anyway.
    expected = (DEPTH - 1) * blocks[0].saved_bytes(name, 1024)
    found = more.peaks["loss"].bytes - least.peaks["loss"].bytes
    if family == "gemma2" and name == "attention":  # run dry as flash, which keeps no copies of q, k and v
        expected -= (DEPTH - 1) * 1024 * blocks[0].qkv.outputs * 2
    whole_pages = DEPTH * 3 * 512
    assert expected <= found <= expected * DEPTH / (DEPTH - 1) + whole_pages
    assert more.work != least.work


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in COVERED),
        *((family, {"training": False}) for family in ("llama", "gemma2")),
        *((family, {"block": None}) for family in ("llama", "phi3")),
        *((family, {"dtype": torch.float32}) for family in ("llama", "qwen3")),
    ],
)
def test_every_family_is_run_dry_and_more_takes_more(family: str, changes: dict[str, Any]) -> None:
    config = config_of(family)
    shapes = shapes_of(build(config, torch.bfloat16))

    def peak(**more: Any) -> int:
        asked = step(shapes, **{"engine": "fused", "block": RECOMPUTE, "length": 256} | changes | more)
        found = run_layers_dry(build(config, asked.dtype), asked, 1)
        assert found.held is not None
        assert all(count > 0 for count in found.held.values())
        return max(peak.bytes for peak in found.peaks.values()) + sum(found.held.values())

    usual = peak()
    assert peak(length=512) > usual
    assert peak(rows=8) > usual
    assert peak(r=64) > usual


def test_dropout_and_rows_of_other_lengths_and_older_gpus_are_run_dry(monkeypatch: pytest.MonkeyPatch) -> None:
    config, shapes = small(num_attention_heads=8, num_key_value_heads=2, head_dim=128, intermediate_size=64)
    usual = fused(config, shapes)
    assert "attention workspace" not in usual.fullest("backward").components, "a tensor of our own"
    for changes in ({"even": False}, {"capability": 8}):
        flash = fused(config, shapes, **changes)
        assert flash.fullest("backward").components["attention workspace"] > 0
        assert flash.fullest("backward").bytes > usual.fullest("backward").bytes, "shared keys are repeated there"
    monkeypatch.setattr("veneer.engine.fused.policy.WORKSPACE_BYTES", 0)
    heads = Heads(8, 2, 128)
    more, less = (Call.of(2, 512, heads, room).workspace_bytes(512) for room in (2**30, 0))
    tight = fused(config, shapes).fullest("backward").bytes
    assert usual.fullest("backward").bytes - tight == rounded(more) - rounded(less)
    assert fused(config, shapes, dropout=0.1).fullest("backward").bytes > 0


def test_4_bit_weights_need_room_to_be_made_16_bit() -> None:
    config, shapes = small()
    held = fused(config, shapes, quantized=shapes.quantizable(), method="qlora").held
    both = fused(config, shapes, quantized=shapes.quantizable(), method="qlora", block=DEQUANTIZED).held
    assert held is not None
    assert both is not None
    gate_up_and_down = (2 * 512 + 64) * (256 + 64) + (256 + 64) * (512 + 64)
    assert held["dequantized weights"] == rounded(2 * gate_up_and_down)
    assert both["dequantized weights"] > 2 * DEPTH * 256 * 512 * 3
    assert "dequantized weights" not in (fused(config, shapes).held or {})


def test_a_measured_peak_is_predicted() -> None:
    """H100, torch 2.11: Llama-3-8B in NF4, r 16, 8-bit AdamW, nothing kept but the last block's tensors."""
    for rows, length, measured in ((4, 2048, 9.41), (2, 8192, 12.34)):
        train = {"per_device_train_batch_size": rows, "gradient_checkpointing": True, "gradient_accumulation_steps": 1}
        found = forecast("h100", quantization={"bits": 4}, train=train, data={"max_length": length, "validation": 0})
        assert found.engine == "fused"
        assert found.peak_bytes / GiB == pytest.approx(measured, rel=0.05)


# What it keeps


def test_settings_and_engine_mean_the_same_by_what_is_kept() -> None:
    """What a dry run keeps for true and false is what the engine is built with."""
    config = config_of("llama")
    shapes = shapes_of(build(config, torch.bfloat16))
    for setting in (True, False):
        run = Run.model_validate(
            {"model": {"base": "-"}, "data": {"train": "-"}, "train": {"gradient_checkpointing": setting}}
        )
        asked = step_of(run, "lora", shapes, Padded(1, 64, 32), device_named("80GiB"), "fused")
        prediction, _ = _engine(build(config, torch.bfloat16), asked)
        real = choose.build(model_of("llama"), Train(engine="fused", gradient_checkpointing=setting), "cpu").engine
        assert isinstance(real, FusedEngine)
        assert [block.kept for block in prediction.placement.blocks] == [block.kept for block in real.placement.blocks]


def test_the_verdict_is_of_the_least_and_what_is_kept_stays_within_the_budget() -> None:
    small_card, large_card = (forecast(gpu, quantization={"bits": 4}) for gpu in ("16GiB", "80GiB"))
    assert small_card.peak_bytes == large_card.peak_bytes, "what is kept is no part of what is needed"
    assert 0 < small_card.placement.bytes < large_card.placement.bytes
    for found in (small_card, large_card):
        assert found.peak_bytes + found.placement.bytes <= found.target.budget_bytes
        assert len(found.placement.blocks) == 32
    everything = {
        "activations": dict.fromkeys((*ACTIVATIONS, "x"), "keep"),
        "weights": dict.fromkeys(("qkv", "o", "gate_up", "down"), "dequantized"),
    }
    assert large_card.as_dict()["placement"]["blocks"] == [{"first": 0, "count": 32} | everything]
    assert forecast("4GiB").placement.bytes < 0, "even with the inputs of blocks on the host it does not fit"
    for setting in (True, False):
        assert forecast(train={"gradient_checkpointing": setting}).placement.bytes == 0
    kept = [block.kept for block in forecast(train={"gradient_checkpointing": True}).placement.blocks]
    assert kept == [frozenset()] * 31 + [frozenset(ACTIVATIONS)]


def test_what_is_kept_makes_it_faster() -> None:
    def seconds(**train: Any) -> float:
        found = forecast("h100", base="meta-llama/Llama-3.1-8B", train=train).step_seconds
        assert found is not None
        return found[1]

    everything, auto, least = (seconds(gradient_checkpointing=setting) for setting in (False, "auto", True))
    assert everything == pytest.approx(auto, rel=0.01)
    assert 1.15 * auto < least < 1.5 * auto
    assert least < seconds(engine="reference")


def test_it_needs_less_than_the_reference_engine() -> None:
    assert forecast().peak_bytes < forecast(train={"engine": "reference"}).peak_bytes


def test_a_recorded_pass_stays_beside_the_held_out_loss() -> None:
    found = forecast(data={"validation": 9})
    training = max(found.phases[name].bytes for name in ("forward", "backward"))
    assert found.phases["evaluation"].bytes > training
    assert found.phases["evaluation"].components["recorded passes"] > 0


def test_70b_is_predicted_at_once() -> None:
    forecast("80GiB")  # imports
    started = time.process_time()
    found = forecast("h100", base="meta-llama/Llama-3.1-70B-Instruct", quantization={"bits": 4})
    assert time.process_time() - started < 4
    assert found.engine == "fused"
    assert found.placement.bytes > 0
