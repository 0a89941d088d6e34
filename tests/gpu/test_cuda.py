"""The reference engine on a CUDA GPU: 4-bit weights, bitsandbytes' optimizers, float16, resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.support.runs import StopAt, losses, tiny_run, write_rows
from tests.support.tiny import FAMILIES
from veneer.config import Interrupted
from veneer.training.job import TrainingJob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
OPTIMIZERS = ["adamw_torch", "adamw_8bit", "adamw_32bit", "paged_adamw_8bit", "paged_adamw_32bit"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_in_four_bits(
    family: str, dtype: str, tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    run = tiny_run(
        tiny_model(family),
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        model={"dtype": dtype},
        quantization={"bits": 4},
        train={"gradient_checkpointing": True, "max_steps": 12},
        data={"validation": 2},
    )
    held = torch.cuda.memory_allocated()  # models of other tests in this process
    report = veneer.train(run)
    seen = losses(tmp_path / "run")
    assert seen[-1] < seen[0]
    assert 0 < report.peak_bytes - held < 2**30
    assert veneer.evaluate(tmp_path / "run").as_dict()["rows"] == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_resumed_run_gives_the_same_adapter(
    optim: str, dtype: str, tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def run(name: str) -> veneer.Run:
        return tiny_run(
            tiny_model(),
            path,
            tmp_path / name,
            model={"dtype": dtype},
            quantization={"bits": 4},
            adapter={"r": 64, "lora_dropout": 0.1},
            train={"optim": optim, "save_steps": 3},
        )

    TrainingJob(run("whole")).fit()
    with pytest.raises(Interrupted):
        TrainingJob(run("cut")).fit((StopAt(4),))
    TrainingJob(run("cut"), resume=True).fit()
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    whole, cut = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-3, atol=1e-4)
