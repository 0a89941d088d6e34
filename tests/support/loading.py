"""Bases loaded by Veneer and by Transformers' own reader, and all their tensors."""

import json
import shutil
from pathlib import Path
from typing import Any

from veneer.config import Model, Quantization
from veneer.machine.device import find_machine
from veneer.model.load import LoadReport, keep_4bit_layout, load_base, load_plainly, settings_of
from veneer.model.locate import BaseSource, locate
from veneer.model.quiet import quiet

CACHED = Quantization(cache=True)


def load(folder: Path, quantization: Quantization | None = None, dtype: str = "float32") -> tuple[Any, LoadReport]:
    settings = Model.model_validate({"base": str(folder), "dtype": dtype})
    return load_base(locate(settings), settings, quantization, find_machine())


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
