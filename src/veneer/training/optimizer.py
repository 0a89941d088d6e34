"""AdamW by the names Transformers uses: torch's own, or bitsandbytes' with 8-bit and paged states.

Paged states need CUDA; elsewhere the same states are kept unpaged, which changes no number. Whole weights have an
optimizer of their own (full_optimizer.py): those of full fine-tuning, and 16-bit biases and modules beside an adapter.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from veneer.config import Train
from veneer.engine.interface import Engine
from veneer.machine.device import resolve_optim, unpaged
from veneer.model.full import is_full, linear_weights
from veneer.model.quiet import quiet
from veneer.training.full_optimizer import FullOptimizer

BETAS, EPSILON = (0.9, 0.999), 1e-8
MASTER = "master"  # name of an engine's flat parameter
BLOCK = 256  # values that share a constant in bitsandbytes' 8-bit states


def parameters_to_update(
    model: Any, engine: Engine, train: Train, device: str, has_separate_states: bool = False
) -> dict[str, torch.nn.Parameter]:
    """Return what the optimizer updates, by the names that its state has in checkpoints.

    An engine that lays all adapters into one parameter has them updated in one launch. Values of two matrices never
    share a block of 8-bit states: where they would, each matrix is updated by itself; so it is where rates differ,
    and where training goes on from a state of each matrix (`has_separate_states`), which another engine left.
    """
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if train.loraplus_lr_ratio is not None or has_separate_states:
        return adapters
    in_blocks = "8bit" in resolve_optim(train.optim, device)
    if engine.master is None or (in_blocks and any(p.numel() % BLOCK for p in adapters.values())):
        return adapters
    return {MASTER: engine.master}


def optimizer_of(
    model: Any, updated: Mapping[str, torch.nn.Parameter], train: Train, device: str
) -> torch.optim.Optimizer:
    """Make the optimizer of a model: AdamW over its adapter, or over its weights if all are trained."""
    groups, optim = groups_by_rate(updated, train), resolve_optim(train.optim, device)
    if is_full(model):
        assert train.master_weights != "auto", "it is decided before the optimizer is made"
        has_masters = train.master_weights == "float32"
        return FullOptimizer(updated, groups, linear_weights(model), has_masters, train, optim, BETAS, EPSILON)
    if any(parameter.dtype.itemsize < 4 for parameter in updated.values()):
        return FullOptimizer(updated, groups, frozenset(), True, train, unpaged(optim), BETAS, EPSILON)
    return build_optimizer(groups, train, device)


def groups_by_rate(updated: Mapping[str, torch.nn.Parameter], train: Train) -> list[Any]:
    """Return what is updated, in groups with the ratio of their rates (`lr_ratio`) where these differ."""
    ratio = train.loraplus_lr_ratio
    if ratio is None:
        return list(updated.values())
    faster = [parameter for name, parameter in updated.items() if ".lora_B." in name]
    others = [parameter for name, parameter in updated.items() if ".lora_B." not in name]
    return [{"params": others, "lr_ratio": 1.0}, {"params": faster, "lr_ratio": ratio}]


def build_optimizer(parameters: Iterable[Any], train: Train, device: str) -> torch.optim.Optimizer:
    """Make AdamW over parameters, or groups of them; the loop sets the learning rate before each step."""
    name = resolve_optim(train.optim, device)
    assert train.learning_rate != "auto", "it is found before the optimizer is made"
    settings: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": BETAS,
        "eps": EPSILON,
        "weight_decay": train.weight_decay,
    }
    if name == "adamw_torch":
        return torch.optim.AdamW(parameters, fused=device != "mps", **settings)
    with quiet():
        from bitsandbytes import optim

        kinds = {
            "adamw_8bit": optim.AdamW8bit,
            "adamw_32bit": optim.AdamW32bit,
            "paged_adamw_8bit": optim.PagedAdamW8bit,
            "paged_adamw_32bit": optim.PagedAdamW32bit,
        }
        optimizer: torch.optim.Optimizer = kinds[name](parameters, **settings)
        return optimizer


def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the states that the optimizer does not have yet, as zeros, as its own first step would.

    Libraries allocate them within that step, bitsandbytes between the updates of two parameters: were memory to run
    out there, some parameters would be updated, some not, and a state that was begun would pass for a whole one.
    With the states in place the update of both libraries works in place.

    Raises:
        torch.OutOfMemoryError: they do not fit; the states of each parameter are there whole or not at all.
    """
    for number, group in enumerate(optimizer.param_groups):
        for at, parameter in enumerate(group["params"]):
            if optimizer.state[parameter]:
                continue
            if isinstance(optimizer, torch.optim.AdamW):
                device = parameter.device if group["fused"] else "cpu"  # as in `set_state`
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
                continue
            try:
                optimizer.init_state(group, parameter, number, at)  # type: ignore[attr-defined]
            except torch.OutOfMemoryError:
                del optimizer.state[parameter]
                raise


def get_state(
    optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], copies: bool = True
) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as tensors by name (`<parameter>/<state>`), for safetensors.

    Args:
        optimizer: The optimizer.
        names: Names of its parameters.
        copies: Whether what is on the host already is copied.
    """
    # bitsandbytes' states share tables, which safetensors does not take; those of whole weights share none.
    copies = copies or not isinstance(optimizer, FullOptimizer)
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            tensors[f"{names[parameter]}/{key}"] = tensor.detach().to("cpu", copy=copies).contiguous()
    return tensors


def set_state(
    optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], tensors: dict[str, torch.Tensor]
) -> None:
    """Restore what `get_state` returned."""
    by_name = {name: parameter for parameter, name in names.items()}
    # torch counts its steps in a tensor, on the device where the update is fused; bitsandbytes in a plain int.
    is_torch = isinstance(optimizer, torch.optim.AdamW)
    for key, tensor in tensors.items():
        name, state = key.rsplit("/", 1)
        parameter = by_name[name]
        value: Any = tensor.to(parameter.device)
        if tensor.dim() == 0 and not is_torch:
            value = tensor.item()
        elif tensor.dim() == 0 and not optimizer.defaults["fused"]:
            value = tensor
        optimizer.state[parameter][state] = value


def layout_of(model: Any, master: torch.nn.Parameter) -> list[tuple[str, int]]:
    """Return the parameters that are views of an engine's `master`, in their order there, with their sizes."""
    start = master.untyped_storage().data_ptr()
    views = [(n, p) for n, p in model.named_parameters() if p.untyped_storage().data_ptr() == start and p is not master]
    return [(name, view.numel()) for name, view in sorted(views, key=lambda view: view[1].storage_offset())]


def split_state(
    tensors: Mapping[str, torch.Tensor], layout: Sequence[tuple[str, int]], updated: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the state of an engine's `master` as states of the parameters in it, with the same bits.

    Args:
        tensors: State by name, as `get_state` returned it.
        layout: See `layout_of`.
        updated: The parameters, by name.
    """
    total = sum(size for _, size in layout)
    found = {}
    for key, tensor in tensors.items():
        state, start = key.removeprefix(f"{MASTER}/"), 0
        for name, size in layout:
            part = tensor
            if tensor.numel() == total:
                part = tensor[start : start + size].reshape(updated[name].shape)
            elif state.startswith("absmax"):
                assert start % BLOCK == 0, "blocks of two matrices are never shared"
                assert size % BLOCK == 0, "blocks of two matrices are never shared"
                part = tensor[start // BLOCK : (start + size) // BLOCK]
            found[f"{name}/{state}"] = part.clone()
            start += size
    return found
