"""What a plan foresees of the fused engine is what a GPU's allocator counts."""

import gc
from typing import Any

import pytest
import torch
import transformers

from veneer.config import Adapter, Train
from veneer.data.batch import Batch
from veneer.engine.dry_run import Step
from veneer.engine.fused.dry_run import run_layers_dry
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.policy import block_placement
from veneer.engine.objective import LIKELIHOOD
from veneer.model.attach import attach
from veneer.model.shapes import build, shapes_of
from veneer.planning.memory import phases
from veneer.training.optimizer import build_optimizer

pytestmark = pytest.mark.gpu


def config_of(family: str) -> Any:
    config = getattr(transformers, f"{family}Config")(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4,
        head_dim=128, vocab_size=32000, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    return config


def batch_of(rows: int, length: int) -> Batch:
    ids = torch.randint(3, 32000, (rows * length,))
    targets = ids.roll(-1)
    targets[length - 1 :: length] = -100
    weights = (targets >= 0).float()
    return Batch(ids, targets, weights, (length,) * rows, int(weights.sum()), float(weights.sum()))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_the_peak_of_a_step_is_predicted(family: str, checkpointing: bool) -> None:
    rows, length = 8, 1024
    config = config_of(family)
    gc.collect()  # what other tests left is not this one's
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    engine = FusedEngine(attach(base, Adapter(r=16), 0), checkpointing)
    optimizer = build_optimizer([engine.master], Train(optim="adamw_8bit"), "cuda")
    batch = batch_of(rows, length)
    for step in range(4):
        if step == 1:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        engine.forward_backward(batch.scaled(1 / batch.trained), LIKELIHOOD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated() - before

    shapes = shapes_of(build(config, torch.bfloat16))
    asked = Step(
        rows, length, rows * (length - 1), torch.bfloat16, targets=shapes.targets("all-linear"), engine="fused",
        block=block_placement(()) if checkpointing else None, keeps_last=checkpointing,
        capability=torch.cuda.get_device_capability()[0],
    )  # fmt: skip
    dry = run_layers_dry(build(config, torch.bfloat16), asked, 1)
    found = phases(shapes, asked, "adamw_8bit", dry, "cuda")
    assert max(found[name].bytes for name in ("forward", "backward")) == pytest.approx(measured, rel=0.05)
