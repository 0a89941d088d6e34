"""Streamed loading on a GPU: what Transformers' reader gives, and no more memory than the tensors at work."""

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import veneer
from tests.support.engines import COVERED
from tests.support.loading import CACHED, copied, load, plainly, tensors
from tests.support.runs import losses, tiny_run, write_rows
from tests.support.tiny import FAMILIES
from veneer.config import Adapter, Quantization, Train
from veneer.data.batch import Batch, Example
from veneer.engine import choose
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.temporary import lies_on_host
from veneer.model import reader
from veneer.model.attach import attach
from veneer.planning.memory import LIBRARIES
from veneer.training import parts
from veneer.training.job import TrainingJob

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


def assert_on_host(base: Any, theirs: Any) -> None:
    """The tensors of an ordinary load to the GPU, of which only norms, biases and buffers are there."""
    from bitsandbytes.nn import Linear4bit

    ours, ordinary = tensors(base), tensors(theirs)
    assert ours.keys() == ordinary.keys()
    for name, tensor in ordinary.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name].cpu(), tensor.cpu()), name
    ends = {id(module.weight) for module in (base.get_input_embeddings(), base.get_output_embeddings())}
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        stays = id(tensor) in ends or getattr(tensor, "quant_state", None) is not None
        assert tensor.device.type == ("cpu" if stays else "cuda"), name
        assert not tensor.is_pinned(), name
    for module in base.modules():
        if isinstance(module, Linear4bit):
            state = module.quant_state
            assert module.weight.quant_state is state
            assert module.weight.module is module
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            assert {part.device.type for part in parts} == {"cpu"}


@pytest.mark.parametrize("family", COVERED)
def test_a_load_to_the_host_gives_the_tensors_of_an_ordinary_one(
    family: str, tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tiny_model(family), tmp_path / "model")
    theirs, _ = load(folder, Quantization(), "bfloat16")
    for way in ("files", "cache"):
        base, report = load(folder, CACHED, "bfloat16", to_host=True)
        assert report.way == way
        assert_on_host(base, theirs)
    again, report = load(folder, CACHED, "bfloat16")
    assert report.way == "cache"
    assert all(torch.equal(tensors(again)[name].cpu(), tensor.cpu()) for name, tensor in tensors(theirs).items())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=1000))
    mapped, report = load(folder, CACHED, "bfloat16", to_host=True)
    assert (report.way, report.bytes_read) == ("cache", 0)
    assert_on_host(mapped, theirs)


@pytest.mark.parametrize("available", [2**40, 1000], ids=["in memory", "mapped"])
def test_a_load_to_the_host_puts_one_weight_at_a_time_on_the_gpu(
    available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=6, vocab_size=32_768)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    load(tmp_path, Quantization(), "bfloat16", to_host=True)  # loads bitsandbytes' own tables
    gc.collect()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=available, available=available))
    for way in ("files" if available > 2**30 else "cache", "cache"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        base, report = load(tmp_path, CACHED, "bfloat16", to_host=True)
        assert report.way == way
        assert torch.cuda.max_memory_allocated() - held < 3 * 2048 * 8192 * 2
        assert torch.cuda.memory_allocated() - held < 2**20, "norms and rotary buffers alone"
        assert base.lm_head.weight.device.type == "cpu"
        del base
        gc.collect()


def test_a_model_in_the_hosts_memory_is_checked_by_its_first_blocks(tiny_model: Callable[..., Path]) -> None:
    base, _ = load(tiny_model(), Quantization(), "bfloat16", to_host=True)
    model: Any = attach(base, Adapter(r=16), 0)
    assert lies_on_host(model)
    engine = FusedEngine(model)
    assert engine.is_on_host, "it moves nothing to the GPU until it has planned its memory"
    before = [(parameter.device, parameter.data_ptr()) for parameter in model.parameters()]
    held = torch.cuda.memory_allocated()
    rows = [Example(np.arange(3, 203) % 384, ((1, 200, 1.0),), "") for _ in range(2)]
    found = choose.compare(model, engine, Train(engine="fused"), "cuda", [rows])
    assert found.holds, found.describe()
    assert [(parameter.device, parameter.data_ptr()) for parameter in model.parameters()] == before
    assert torch.cuda.memory_allocated() - held <= LIBRARIES["cuda"], "cuBLAS' workspace may stay"
    assert lies_on_host(model)
    assert engine.is_on_host
    loss = engine.forward_backward(Batch.of(rows), LIKELIHOOD).loss.item()
    resident = attach(load(tiny_model(), Quantization(), "bfloat16")[0], Adapter(r=16), 0)
    assert loss == FusedEngine(resident).forward_backward(Batch.of(rows), LIKELIHOOD).loss.item()


def test_a_run_from_the_hosts_memory_verifies_and_trains(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    sections: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "quantization": {"bits": 4}, "adapter": {"r": 16}}
    sections["train"] = {"gradient_checkpointing": "auto"}
    runs = {name: tiny_run(tiny_model(), path, tmp_path / name, **sections) for name in ("host", "device")}
    TrainingJob(runs["device"]).fit()
    monkeypatch.setattr(parts, "_streams_weights", lambda prediction: True)
    found = veneer.verify(runs["host"])
    assert found.passed, [check.as_dict() for check in found.checks if not check.passed]
    assert found.choice.engine.name == "fused"
    job = TrainingJob(runs["host"])
    assert "gives the reference's numbers" in job.choice.reason
    job.fit()
    # Attention's backward adds in no fixed order there.
    assert losses(tmp_path / "host") == pytest.approx(losses(tmp_path / "device"), rel=1e-3)
