"""Reads single weights of a base from its files, as they were before it was quantized."""

from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open

from veneer.config import UserError
from veneer.model.locate import BaseSource
from veneer.model.shards import find_files, read_headers


def weights_by_path(source: BaseSource, base: Any) -> Callable[[str], torch.Tensor]:
    """Return a function from a module's path to its weight in the base's files.

    Args:
        source: base model, whose files are local.
        base: model that was loaded from it.
    """
    pieces = {piece.name: piece for piece in read_headers(find_files(source) or ())}
    prefix = f"{base.base_model_prefix}."

    def weight_of(path: str) -> torch.Tensor:
        names = (f"{path}.weight", f"{path.removeprefix(prefix)}.weight", f"{prefix}{path}.weight")
        piece = next((pieces[name] for name in names if name in pieces), None)
        if piece is None:
            raise UserError(
                f"model.base = {source.name}: its files have no {path}.weight, which adapter.init_lora_weights needs",
                "set adapter.init_lora_weights: true, or leave that module out of adapter.target_modules",
            )
        with safe_open(piece.file, "pt") as file:
            weight: torch.Tensor = file.get_tensor(piece.name)
        return weight

    return weight_of
