"""Runs on a CUDA GPU take the fused engine, checked, resumable; `veneer verify` passes there and finds faults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.support.engines import COVERED
from tests.support.notices import notified
from tests.support.runs import StopAt, losses, tiny_run, write_rows
from veneer.config import Interrupted
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import Objective, StepOutput
from veneer.training.job import TrainingJob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("family", COVERED)
def test_auto_takes_the_fused_engine_and_every_check_passes(
    family: str, bits: int, tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    run = tiny_run(
        tiny_model(family),
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        model={"dtype": "bfloat16"},
        quantization={"bits": 4} if bits == 4 else None,
        adapter={"r": 16},
        train={"optim": "auto", "gradient_accumulation_steps": 2},
        data={"validation": 2},
    )
    found = veneer.verify(run)
    assert found.passed, [check.as_dict() for check in found.checks if not check.passed]
    assert found.choice.engine.name == "fused"
    job = TrainingJob(run)
    assert job.engine.name == "fused", job.choice.reason
    job.fit()
    seen = losses(tmp_path / "run")
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit"])
def test_a_resumed_fused_run_is_the_one_that_was_not(
    optim: str, tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def run(name: str) -> veneer.Run:
        return tiny_run(
            tiny_model(),
            path,
            tmp_path / name,
            model={"dtype": "bfloat16"},
            quantization={"bits": 4},
            adapter={"r": 64, "lora_dropout": 0.1},
            train={"optim": optim, "save_steps": 3, "engine": "fused"},
        )

    TrainingJob(run("whole")).fit()
    with pytest.raises(Interrupted):
        TrainingJob(run("cut")).fit((StopAt(4),))
    TrainingJob(run("cut"), resume=True).fit()
    # Attention's backward adds in no fixed order there.
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    whole, cut = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_wrong_kernel_makes_the_run_fall_back(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_backward = FusedEngine.forward_backward

    def wrong(self: FusedEngine, batch: Any, objective: Objective) -> StepOutput:
        output = forward_backward(self, batch, objective)
        named = self.model.named_parameters()
        parameter = next(p for name, p in named if "layers.1.mlp.down_proj.lora_A" in name)
        parameter.grad.mul_(4)  # a layer's own limit is 0.4, for rounding
        return output

    monkeypatch.setattr(FusedEngine, "forward_backward", wrong)
    run = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", model={"dtype": "auto"})
    with notified("mlp.down_proj.lora_A"):
        veneer.train(run)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
