"""Bases loaded by Veneer and by Transformers' own reader, and all their tensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from veneer.config import Model, Quantization
from veneer.machine.device import find_machine
from veneer.model.load import LoadReport, keep_4bit_layout, load_base, load_plainly, settings_of
from veneer.model.locate import BaseSource, locate
from veneer.model.quiet import quiet

CACHED = Quantization(cache=True)
IDS = torch.arange(3, 35).view(2, 16)


def load(
    folder: Path, quantization: Quantization | None = None, dtype: str = "float32", to_host: bool = False
) -> tuple[Any, LoadReport]:
    settings = Model.model_validate({"base": str(folder), "dtype": dtype})
    return load_base(locate(settings), settings, quantization, find_machine(), to_host)


def plainly(folder: Path, quantization: Quantization | None = None, dtype: str = "float32") -> Any:
    return plainly_of(locate(Model(base=str(folder))), quantization, dtype)


def plainly_of(source: BaseSource, quantization: Quantization | None = None, dtype: str = "float32") -> Any:
    model = Model.model_validate({"base": source.name, "dtype": dtype})
    with quiet():
        base = load_plainly(source, settings_of(model, quantization, find_machine()))[0]
    base.config.use_cache = False
    keep_4bit_layout(base)
    return base


def tensors(model: Any) -> dict[str, Any]:
    found = dict(model.named_parameters()) | {f"{name} (buffer)": buffer for name, buffer in model.named_buffers()}
    return found | {f"{name} (saved)": value for name, value in model.state_dict().items()}


def copied(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a model's folder, with a changed configuration."""
    shutil.copytree(folder, to)
    found = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(found | config))
    return to


def assert_same(ours: Any, theirs: Any) -> None:
    """Every tensor with what belongs to it, how they are tied, and what the model computes."""
    found, wanted = tensors(ours), tensors(theirs)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        mine = found[name]
        assert (type(mine), mine.dtype, mine.shape) == (type(tensor), tensor.dtype, tensor.shape), name
        assert torch.equal(mine, tensor), name
        state, other = (getattr(t, "quant_state", None) for t in (mine, tensor))
        if state is not None and other is not None:
            assert state.as_dict(packed=True).keys() == other.as_dict(packed=True).keys()
            assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (
                other.shape, other.dtype, other.blocksize, other.quant_type,
            )  # fmt: skip
            assert (mine.compress_statistics, mine.bnb_quantized) == (tensor.compress_statistics, tensor.bnb_quantized)
    head, embeddings = (model.get_output_embeddings().weight for model in (ours, theirs))
    assert (head is ours.get_input_embeddings().weight) == (embeddings is theirs.get_input_embeddings().weight)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()
    assert getattr(ours, "is_loaded_in_4bit", False) == getattr(theirs, "is_loaded_in_4bit", False)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
