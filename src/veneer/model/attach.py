"""Attaches, saves and loads an adapter on a base model. PEFT owns the modules and the file format.

The adapter's weights are float32 whatever the base's dtype: they are the master weights of the optimizer.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from veneer.config import Adapter, UserError
from veneer.config.files import read_json, reading
from veneer.config.manifest import ADAPTER
from veneer.config.notify import notify
from veneer.model.adapters import find_method, require_method
from veneer.model.adapters.from_base import as_changes, starts_from_base, take_part_of_base
from veneer.model.locate import BaseSource
from veneer.model.quiet import quiet
from veneer.model.shapes import shapes_of
from veneer.model.shards import read_header
from veneer.model.trained_parts import TrainedParts, find_parts


def attach(
    base: Any, adapter: Adapter, seed: int, gradient_checkpointing: bool = False, new_tokens: Sequence[int] = ()
) -> Any:
    """Put a new adapter on a frozen base model, in place; return PEFT's wrapper around it.

    Args:
        base: base model.
        adapter: settings.
        seed: seed of what begins at random.
        gradient_checkpointing: whether activations are recomputed.
        new_tokens: ids of tokens that the run adds, whose rows are trained.

    Raises:
        UserError: a name in the settings matches nothing, or two settings train the same module.
    """
    parts = find_parts(shapes_of(base), adapter, new_tokens)
    with quiet():
        from peft import get_peft_model

        config = find_method(adapter).configure(adapter, _targets(base, adapter))
    _configure_parts(config, adapter, parts)
    biases = _copies_of_biases(base, adapter.bias)
    torch.manual_seed(seed)
    with quiet():
        try:
            model = get_peft_model(base, config)
        except ValueError as error:
            raise UserError(f"adapter: PEFT cannot adapt this model: {error}", "set adapter.target_modules") from None
        if gradient_checkpointing:
            # The non-reentrant kind needs no gradient on the inputs to reach the adapters.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _train_parts(model, parts)
    model.base_biases = biases
    if starts_from_base(adapter):
        take_part_of_base(model, str(adapter.init_lora_weights))
    model.peft_config["default"].init_lora_weights = adapter.init_lora_weights
    _notify_left_out(model, adapter)
    return model


def _configure_parts(config: Any, adapter: Adapter, parts: TrainedParts) -> None:
    """Write into PEFT's configuration what is trained beside the adapter's matrices."""
    config.bias = adapter.bias
    config.modules_to_save = sorted(parts.modules) or None
    config.trainable_token_indices = {path: list(tokens) for path, tokens in parts.rows} or None
    config.ensure_weight_tying = parts.tied is not None and bool(parts.modules)
    if parts.tied is not None:
        notify(
            f"the head ({parts.tied}) shares the weights of the embeddings in this base: both are trained as one",
            "info",
            "adapter",
        )


def _train_parts(model: Any, parts: TrainedParts) -> None:
    """Make trained rows float32, as the adapter's matrices are, and freeze biases that text does not pass, in place."""
    for name, parameter in model.get_base_model().named_parameters():
        if ".trainable_tokens_delta." in name:
            parameter.data = parameter.data.float()
        elif parameter.requires_grad and name.endswith("bias") and "modules_to_save" not in name:
            parameter.requires_grad_(name.replace(".base_layer.", ".") in parts.biases)


def _copies_of_biases(base: Any, bias: str) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Return each bias of a base with a copy of it, where training changes biases in place."""
    if bias == "none":
        return []
    return [(p, p.detach().clone()) for name, p in base.named_parameters() if name.endswith("bias")]


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within the context, a PEFT model is its base; PEFT itself would leave trained biases as they are."""
    trained = [(parameter, parameter.data) for parameter, _ in getattr(model, "base_biases", ())]
    with ExitStack() as stack:
        with quiet():
            stack.enter_context(model.disable_adapter())
        try:
            for parameter, before in getattr(model, "base_biases", ()):
                parameter.data = before
            yield
        finally:
            for parameter, data in trained:
                parameter.data = data


def detach(model: Any) -> Any:
    """Take the adapter off a base model, in place; return the base as it was before `attach`."""
    for parameter, before in getattr(model, "base_biases", ()):
        parameter.data = before
    with quiet():
        from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):  # PEFT would leave the trained copy in the base
            module.modules_to_save["default"] = module.original_module
    base = model.unload()
    base.requires_grad_(False)
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
    require_method(adapter, shapes, meant)
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
            config = read_json(folder / "adapter_config.json", "peft_type")
            biases = _copies_of_biases(base, str(config.get("bias", "none")))
            model = PeftModel.from_pretrained(base, str(folder))
    model.base_biases = biases
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


def write_as_changes(model: Any, folder: Path) -> None:
    """Write the matrices of an adapter that began as a part of its base as the change of that, which bears rounding."""
    if starts_from_base(model.peft_config["default"]):
        from safetensors.torch import load_file, save_file

        save_file(as_changes(load_file(folder / ADAPTER)), folder / ADAPTER, {"format": "pt"})


def set_adapter(model: Any, folder: Path) -> None:
    """Give a model's adapter the weights in a folder that `write_adapter` wrote, in place."""
    with quiet():
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(folder / ADAPTER))


def write_adapter(model: Any, folder: Path) -> None:
    """Write the adapter alone, in PEFT's format; whatever it began with, it is plain LoRA on its base."""
    config = model.peft_config["default"]
    began_with, eva = getattr(config, "init_lora_weights", None), getattr(config, "eva_config", None)
    try:
        if began_with not in (None, "gaussian"):
            config.init_lora_weights, config.eva_config = True, None
        with quiet():
            model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        if began_with is not None:
            config.init_lora_weights, config.eva_config = began_with, eva


def copy_adapter(model: Any) -> Callable[[Path], None]:
    """Copy the adapter to the host; returns a function that writes it as `write_adapter` does, without the card."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    with quiet():
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    if getattr(config, "init_lora_weights", None) not in (None, "gaussian"):
        config.init_lora_weights, config.eva_config = True, None
    mapping = None
    if config.task_type is None:
        base = type(model.get_base_model())
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}

    def write(folder: Path) -> None:
        save_file(weights, folder / ADAPTER, {"format": "pt"})
        config.save_pretrained(str(folder), auto_mapping_dict=mapping)

    return write


def count_parameters(model: Any) -> dict[str, int]:
    """Count all parameters and the trainable ones. Packed 4-bit weights count as weights, not as bytes."""
    config = getattr(model, "peft_config", {}).get("default")
    frozen_share = find_method(config).frozen_share if config is not None else 0.0
    total = trainable = 0
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        if parameter.requires_grad:
            trainable += round(count * (1 - frozen_share)) if "lora_" in name else count
    return {"total": total, "trainable": trainable}
