"""Streamed loading on a GPU: what Transformers' reader gives, and no more memory than the tensors at work."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.loading import CACHED, copied, load, plainly, tensors
from tests.support.tiny import FAMILIES
from veneer.config import Quantization
from veneer.model import reader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [None, Quantization(), CACHED], ids=["16-bit", "4-bit", "kept"])
def test_every_family_loads_as_with_transformers(
    family: str, quantization: Quantization | None, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = copied(tiny_model(family), tmp_path / "model")
    theirs = tensors(plainly(folder, quantization, "bfloat16"))
    for way in ("files", "cache" if quantization is CACHED else "files"):
        base, report = load(folder, quantization, "bfloat16")
        assert report.way == way
        ours = tensors(base)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].device == tensor.device, name
            assert torch.equal(ours[name], tensor), name


def test_memory_is_bounded_while_it_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=6, vocab_size=512)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    load(tmp_path, Quantization(), "bfloat16")  # loads bitsandbytes' own tables
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    base, _ = load(tmp_path, Quantization(), "bfloat16")
    weights = torch.cuda.memory_allocated() - held
    peak = torch.cuda.max_memory_allocated() - held
    largest = 2048 * 8192 * 2
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert held - before < 64 * 2**20
    assert peak < weights + reader.READ_AHEAD + 3 * largest
