"""Every family: the loss falls, and the adapter reloads in plain PEFT with the same logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.runs import losses, tiny_run, write_rows
from tests.support.tiny import FAMILIES
from veneer.training.job import TrainingJob

IDS_BL = torch.tensor([[5, 40, 41, 42, 43, 44, 45, 46]])


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_its_adapter_reloads(
    family: str, bits: int, tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    run = tiny_run(
        tiny_model(family),
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        quantization={"bits": 4} if bits == 4 else None,
    )
    job = TrainingJob(run)
    job.fit()
    seen = losses(tmp_path / "run")
    assert seen[-1] < seen[0]

    job.model.eval()
    with torch.no_grad():
        live = job.model(input_ids=IDS_BL).logits
        with job.model.disable_adapter():
            base = job.model(input_ids=IDS_BL).logits
    assert not torch.equal(live, base), "the adapter changes the model"
    quantized = getattr(job.model.get_base_model().config, "quantization_config", None)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32, quantization_config=quantized)
    for module in plain.modules():  # bitsandbytes' repacked kernel rounds to bf16 on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    reloaded = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=IDS_BL).logits, live)


def test_all_linear_reaches_conv1d_and_leaves_the_head_alone(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    train = write_rows(tmp_path / "rows.jsonl", rows)
    for family, expected in [
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ]:
        job = TrainingJob(tiny_run(tiny_model(family), train, tmp_path / family))
        adapted = {name.split(".")[-4] for name, p in job.model.named_parameters() if p.requires_grad}
        assert adapted == expected
