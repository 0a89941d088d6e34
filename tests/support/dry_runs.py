"""Configurations of tiny models of any depth, and steps to run dry on them."""

from typing import Any

import torch

from tests.support.tiny import FAMILIES
from veneer.engine.dry_run import Step
from veneer.model.shapes import Shapes


def config_of(family: str, depth: int = 2) -> Any:
    import transformers

    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**settings)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * depth)[:depth]
    return config


def step(shapes: Shapes, **changes: Any) -> Step:
    settings: dict[str, Any] = {
        "rows": 2, "length": 96, "trained": 60, "r": 4,
        "dtype": torch.bfloat16, "targets": shapes.targets("all-linear"),
    }  # fmt: skip
    return Step(**settings | changes)
