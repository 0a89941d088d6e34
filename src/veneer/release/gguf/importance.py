"""The importance matrix of a run: the mean square of each weight's inputs over its own rows.

llama.cpp's types of 2 to 6 bits choose scales so that the weighted error of a row is least; the weight of a column is
the mean square of the input that meets it. Measured on the run's own training rows, the bits go where the task needs
them. Held-out rows are not used: they judge the result.

Hooks on the judged model's linear layers sum squares in float32, one number an input column: a few MB for any model.
The matrix lies beside the file that was made with it, so that a certificate can make the same bytes again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from veneer.data.batch import Example
from veneer.model.full import is_full
from veneer.release.merge.adapter_delta import AdapterDelta

FILE = "importance.safetensors"
IMPORTANCE_ROWS = 64  # training rows that are read: on the demo more change nothing (bench/shipped.py)

Importance = dict[str, torch.Tensor]


def measure_importance(model: Any, rows: Sequence[Example]) -> Importance:
    """Mean square of each input column of each linear layer, float32 [columns], by the name of its weight.

    Args:
        model: The judged model, with its adapter, in evaluation mode.
        rows: Training rows.
    """
    device = model.get_input_embeddings().weight.device
    with torch.no_grad(), _summed_squares(model if is_full(model) else model.get_base_model()) as sums:
        for row in rows:
            model(input_ids=torch.tensor([[int(number) for number in row.ids]], device=device), logits_to_keep=1)
    return {name: squares / tokens for name, (squares, tokens) in sums.items()}


@contextmanager
def _summed_squares(base: Any) -> Iterator[dict[str, tuple[torch.Tensor, int]]]:
    """Sum the squares of the inputs of each adapted or plain linear layer, and count the tokens."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    sums: dict[str, tuple[torch.Tensor, int]] = {}

    def hook(name: str) -> Any:
        def add(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x_TI = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            squares, tokens = sums.get(name, (torch.zeros(x_TI.shape[-1], device=x_TI.device), 0))
            sums[name] = (squares + x_TI.square().sum(0), tokens + len(x_TI))

        return add

    handles, inside = [], ""
    for path, module in base.named_modules():
        if inside and path.startswith(inside):
            continue
        is_adapted = isinstance(module, BaseTunerLayer)
        linear = module.get_base_layer() if is_adapted else module
        if isinstance(linear, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(hook(f"{path}.weight")))
        inside = f"{path}." if is_adapted else inside
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def importance_of(importance: Importance, delta: AdapterDelta, name: str) -> torch.Tensor | None:
    """Return the importance of a tensor's columns; for tied embeddings it is that of the head's inputs."""
    for parameter, found in importance.items():
        if delta.name_on_disk(parameter) == name:
            return found
    return None


def write_importance(folder: Path, importance: Importance) -> None:
    """Write the matrix into the folder of the file that was made with it."""
    save_file({name: value.cpu().contiguous() for name, value in importance.items()}, folder / FILE)


def read_importance(file: Path) -> Importance:
    """Read the matrix beside a GGUF file; empty where there is none."""
    path = file.with_name(FILE)
    return load_file(path) if path.is_file() else {}
