"""An adapter's matrices from its folder in PEFT's format, and what of PEFT's cannot share a base with others.

Low-rank matrices on linear layers (LoRA, rsLoRA, with ranks and scales by pattern; so PiSSA, OLoRA, EVA and LoftQ as
they are delivered) add to the output of a layer, row by row. Whole modules, trained rows, biases and other methods
change the base itself; such a run is served alone, or merged.
"""

import math
from typing import Any

import torch

from veneer.config import UserError
from veneer.config.files import reading
from veneer.config.manifest import ADAPTER
from veneer.model.quiet import quiet
from veneer.model.tuned import TunedModel
from veneer.serving.mixed import Matrices

PREFIX = "base_model.model."
ENDS = {".lora_A.weight": "a", ".lora_B.weight": "b"}


def more_than_low_rank(tuned: TunedModel) -> str | None:
    """Say what of an adapter is more than low-rank matrices on linear layers; None: nothing is."""
    if tuned.is_full:
        return "all weights were trained"
    config = tuned.peft_config
    if config.get("peft_type") != "LORA":
        return f"the method is {config.get('peft_type')}"
    if config.get("use_dora"):
        return "it is DoRA, which scales the base's weights"
    if tuned.added_tokens:
        return "it adds tokens"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "it has trained biases"
    for key, what in {
        "modules_to_save": "whole trained modules",
        "trainable_token_indices": "trained rows of embeddings",
        "target_parameters": "matrices on stacked experts",
        "layer_replication": "repeated layers",
        "alora_invocation_tokens": "an activation by tokens (aLoRA)",
    }.items():
        if config.get(key):
            return f"it has {what}"
    return None


def read_matrices(tuned: TunedModel, model: Any) -> dict[str, Matrices]:
    """Return an adapter's matrices by the paths of the base's layers, on the CPU, with the scale within B.

    Args:
        tuned: The adapter.
        model: The base.

    Raises:
        UserError: It is more than low-rank matrices, belongs to a base of another shape, or holds NaN or infinite
            numbers, which would spread to the rows beside its own.
    """
    if (more := more_than_low_rank(tuned)) is not None:
        raise UserError(
            f"{tuned.name}: it cannot share a base with others: {more}",
            "serve it alone, or merge it (veneer merge) and serve the merged folder",
        )
    file = tuned.adapter / ADAPTER
    with quiet(), reading(file, "restore it, or fetch it again"):
        from safetensors.torch import load_file

        weights = load_file(file)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None or not name.startswith(PREFIX):
            raise UserError(f"{file}: {name} is no low-rank matrix of a linear layer", "merge it and serve that")
        halves.setdefault(name.removeprefix(PREFIX).removesuffix(end), {})[ENDS[end]] = weight
    layers = dict(model.named_modules())
    found = {path: _matrices(tuned, path, both, layers.get(path)) for path, both in halves.items()}
    for path, matrices in found.items():
        if not all(matrix.to(model.dtype).isfinite().all() for matrix in matrices):
            raise UserError(
                f"{tuned.name}: {path} holds NaN or infinite numbers in {str(model.dtype).removeprefix('torch.')}",
                "restore it, or take an earlier checkpoint of its run",
            )
    return found


def _matrices(tuned: TunedModel, path: str, both: dict[str, torch.Tensor], layer: Any) -> Matrices:
    fix = "name the base it was trained on"
    if layer is None:
        raise UserError(f"{tuned.name}: the base has no layer {path}", fix)
    if both.keys() != {"a", "b"}:
        raise UserError(f"{tuned.name}: {path} has one matrix of two", "restore it, or fetch it again")
    a_RI, b_OR = both["a"], both["b"]
    inputs, outputs = _sizes(layer)
    if a_RI.shape[1:] != (inputs,) or b_OR.shape != (outputs, len(a_RI)):
        shapes = f"{tuple(a_RI.shape)} and {tuple(b_OR.shape)}"
        raise UserError(f"{tuned.name}: {path} takes {inputs} to {outputs}, and its matrices have {shapes}", fix)
    return Matrices(a_RI, b_OR.float() * _scale(tuned.peft_config, path, len(a_RI)))


def _sizes(layer: Any) -> tuple[int, int]:
    """Return inputs and outputs of a linear layer; of a Conv1D the weight says them."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    if hasattr(layer, "nf"):
        return int(layer.weight.shape[0]), int(layer.nf)
    return 0, 0


def _scale(config: dict[str, Any], path: str, rank: int) -> float:
    """Return the factor of an adapter's product on one layer, as PEFT computes it."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), path), config.get("lora_alpha", rank))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"adapter_config.json: lora_alpha = {str(alpha)[:40]}, which is no number", "fetch it again")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
