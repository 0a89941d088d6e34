"""Finds how a base pools hidden states to an embedding, in the file in which sentence-transformers keeps it."""

from pathlib import Path
from typing import Any

from veneer.config import Model
from veneer.config.files import read_optional_json
from veneer.model.locate import local_folder, locate
from veneer.model.shapes import find_config

POOLING = "1_Pooling/config.json"
# Our names, and those of sentence-transformers' file.
NAMES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def find_pooling(model: Model) -> str:
    """Return the pooling of a run: that of the settings, of the base's own file, or the usual one of its kind."""
    if model.pooling != "auto":
        return model.pooling
    folder = local_folder(locate(model))
    stored = read_pooling(folder) if folder is not None else None
    if stored is not None:
        return stored
    return "last" if is_decoder(find_config(model)) else "mean"


def read_pooling(folder: Path) -> str | None:
    """Return the pooling that a folder's file names; None: there is no such file, or it names another kind."""
    settings = read_optional_json(folder / POOLING)
    return next((name for name, key in NAMES.items() if settings.get(key)), None)


def is_decoder(config: Any) -> bool:
    """Return whether a token of such a model sees only those before it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
