"""Starts training from an adapter that is there (`model.adapter`): checks that it fits the run, and takes its weights.

The adapter of the run is a new one with these weights, so it must be of the same method, rank and modules; nothing is
resized. Its passport is compared with the base of the run, since on another base its weights are noise.
"""

from pathlib import Path
from typing import Any

import torch

from veneer.config import Adapter, Model, UserError
from veneer.config.files import read_json, reading
from veneer.config.manifest import read_manifest
from veneer.config.names import require_adapter
from veneer.config.notify import notify
from veneer.model.locate import BaseSource
from veneer.model.passport import read_passport, require_match
from veneer.model.quiet import quiet

FIX = "restore it, or fetch it again"


def find_start(model: Model, adapter: Adapter, source: BaseSource) -> Path | None:
    """Find the adapter that training starts from, before the base is loaded; None: a new one.

    Args:
        model: settings, with the adapter's name.
        adapter: settings of the run's adapter.
        source: base of the run.

    Raises:
        UserError: there is no such adapter, it is of another base, or of another form than the settings say.
    """
    if model.adapter is None:
        return None
    found = require_adapter(model.adapter)
    if found.run is not None and found.path != found.run.adapter:
        read_manifest(found.path)
    require_match(found.path, read_passport(found.path), source)
    config = read_json(found.path / "adapter_config.json", "r", "lora_alpha", fix=FIX)
    settings = {"r": adapter.r, "lora_alpha": adapter.lora_alpha, "use_rslora": adapter.use_rslora}
    theirs = {name: config.get(name, False) for name in settings}
    others = [name for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(name)]
    if others:
        raise UserError(f"model.adapter = {model.adapter}: has {', '.join(others)}, which is not trained here")
    if theirs != settings:
        written = ", ".join(f"{name}: {value:g}" if name != "use_rslora" else f"{name}: {str(value).lower()}"
                            for name, value in theirs.items())  # fmt: skip
        differ = ", ".join(
            f"adapter.{name} = {settings[name]:g}" for name in settings if theirs[name] != settings[name]
        )
        raise UserError(
            f"model.adapter = {model.adapter}: it was trained with {{{written}}}, and the run has {differ}",
            f"set `adapter: {{{written}}}`",
        )
    return found.path


def take_weights(model: Any, folder: Path, name: str) -> None:
    """Replace the weights of a new adapter by those of a folder, in place.

    Args:
        model: PEFT model.
        folder: folder that `find_start` found.
        name: name that the user wrote.

    Raises:
        UserError: its modules are others, or its file is damaged.
    """
    with quiet():
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

    with reading(folder / "adapter_model.safetensors", FIX):
        weights = load_file(folder / "adapter_model.safetensors")
    with quiet():
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
    differ = sorted(key for key in own.keys() | weights.keys() if _shape(own, key) != _shape(weights, key))
    if differ:
        raise UserError(
            f"model.adapter = {name}: {len(differ)} of its matrices are not those of the run's adapter, first "
            f"{differ[0].removeprefix('base_model.model.')}",
            "set adapter.target_modules to the modules that it was trained on",
        )
    with quiet():
        set_peft_model_state_dict(model, {key: value.float() for key, value in weights.items()})
    if not any(value.any() for key, value in weights.items() if "lora_B" in key or "lora_embedding_B" in key):
        notify(
            f"model.adapter = {name}: it changes nothing of the base (its B matrices are zero)", where="model.adapter"
        )


def _shape(weights: dict[str, torch.Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(weights[key].shape) if key in weights else None
