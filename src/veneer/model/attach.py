"""Attaches, saves and loads an adapter on a base model. PEFT owns the modules and the file format.

The adapter's weights are float32 whatever the base's dtype: they are the master weights of the optimizer.
"""

from pathlib import Path
from typing import Any

import torch

from veneer.config import Adapter, UserError
from veneer.config.files import read_json, reading
from veneer.config.notify import notify
from veneer.model.adapters import find_method, require_method
from veneer.model.adapters.from_base import starts_from_base, take_part_of_base
from veneer.model.locate import BaseSource
from veneer.model.quiet import quiet
from veneer.model.shapes import shapes_of
from veneer.model.shards import read_header


def attach(base: Any, adapter: Adapter, seed: int, gradient_checkpointing: bool = False) -> Any:
    """Put a new adapter on a frozen base model, in place; return PEFT's wrapper around it.

    Raises:
        UserError: an entry of target_modules matches nothing.
    """
    with quiet():
        from peft import get_peft_model

        config = find_method(adapter).configure(adapter, _targets(base, adapter))
    torch.manual_seed(seed)
    with quiet():
        try:
            model = get_peft_model(base, config)
        except ValueError as error:
            raise UserError(f"adapter: PEFT cannot adapt this model: {error}", "set adapter.target_modules") from None
        if gradient_checkpointing:
            # The non-reentrant kind needs no gradient on the inputs to reach the adapters.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if starts_from_base(adapter):
        take_part_of_base(model, str(adapter.init_lora_weights))
        model.peft_config["default"].init_lora_weights = adapter.init_lora_weights
    _notify_left_out(model, adapter)
    return model


def detach(model: Any) -> Any:
    """Take the adapter off a base model, in place; return the base as it was before `attach`."""
    base = model.unload()
    if hasattr(base, "peft_config"):  # PEFT leaves it there, and would count a second adapter
        del base.peft_config
    with quiet():
        base.gradient_checkpointing_disable()
    return base


def _notify_left_out(model: Any, adapter: Adapter) -> None:
    """Warn if all-linear has left experts without an adapter."""
    stacked = {name: p for name, p in model.get_base_model().named_parameters() if p.dim() == 3 and "expert" in name}
    left = {name: p.numel() for name, p in stacked.items() if "lora_" not in name and "base_layer" not in name}
    if left and adapter.target_modules == "all-linear":
        counts = count_parameters(model)
        share = sum(left.values()) / (counts["total"] - counts["trainable"])
        notify(
            f"adapter.target_modules = all-linear leaves {share:.0%} of the weights without an adapter: experts, which "
            f"are stacked in parameters and no linear layers ({next(iter(left))})",
            where="adapter.target_modules",
        )


def _targets(base: Any, adapter: Adapter) -> str | list[str]:
    """Return the target modules for PEFT: those of the settings, or full paths where PEFT would match other modules.

    Such modules are a vision tower, layers that are linear by their class alone, and those of exclusions and sets.
    """
    named = adapter.target_modules
    shapes = shapes_of(base)
    meant = shapes.targets(adapter)
    require_method(adapter, meant, shapes.embeddings)
    if adapter.exclude_modules or adapter.layers_to_transform:
        return sorted(meant)
    if named == "all-linear":
        head = base.get_output_embeddings()
        linear = {path for path, m in base.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
        return sorted(meant) if linear - meant else named
    if isinstance(named, str):
        return sorted(meant)
    ends = tuple(f".{name}" for name in named)
    matched = {path for path, _ in base.named_modules() if path in named or path.endswith(ends)}
    return list(named) if matched == meant else sorted(meant)


def load_adapter(base: Any, folder: Path) -> Any:
    """Put a saved adapter on a base model, in place, for inference."""
    with quiet():
        from peft import PeftModel

        with reading(f"{folder}: the adapter does not load on this base", "restore it, or fetch it again"):
            _require_ranks(folder)
            model = PeftModel.from_pretrained(base, str(folder))
    model.eval()
    return model


def _require_ranks(folder: Path) -> None:
    """Raise UserError if a configuration has a larger rank than its weights: PEFT would allocate it."""
    config = read_json(folder / "adapter_config.json", "peft_type")
    held = [piece.shape[0] for piece in read_header(folder / "adapter_model.safetensors") if ".lora_A." in piece.name]
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    asked = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    if held and asked > max(held):
        raise UserError(
            f"{folder / 'adapter_config.json'}: a rank of {asked:,}, and the weights have {max(held):,} at most",
            "restore it, or fetch it again",
        )


def save_adapter(model: Any, tokenizer: Any, chat_template: str | None, base: BaseSource, folder: Path) -> None:
    """Write the adapter in PEFT's format, with the tokenizer and the chat template it was trained with.

    Its configuration names the base as PEFT finds it: the hub id with its revision, or the folder of the weights.
    """
    own_template = tokenizer.chat_template
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.reference, base.revision
    write_adapter(model, folder)
    with quiet():
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(str(folder))
        tokenizer.chat_template = own_template


def write_adapter(model: Any, folder: Path) -> None:
    """Write the adapter alone, in PEFT's format; whatever it began with, it is plain LoRA on its base."""
    config = model.peft_config["default"]
    is_from_base, began_with = starts_from_base(config), getattr(config, "init_lora_weights", None)
    try:
        if is_from_base:
            config.init_lora_weights = True
        with quiet():
            model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        if is_from_base:
            config.init_lora_weights = began_with


def count_parameters(model: Any) -> dict[str, int]:
    """Count all parameters and the trainable ones. Packed 4-bit weights count as weights, not as bytes."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return {"total": total, "trainable": trainable}
