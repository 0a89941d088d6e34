"""Full fine-tuning (`adapter: none`): the base itself is trained, and saved as a model of Transformers' own format.

Such a model has no wrapper around it: `is_full` tells it from one with an adapter. Only weights that text passes are
trained; a vision tower stays as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from veneer.config import UserError
from veneer.config.files import reading
from veneer.config.folder import write_json
from veneer.model.load import base_stop_ids
from veneer.model.locate import BaseSource
from veneer.model.quiet import quiet
from veneer.model.shapes import shapes_of

FIX = "restore it, or delete it"
RATE_SCALE = 0.1  # usual learning rates, relative to LoRA's


def is_full(model: Any) -> bool:
    """Return whether a model is trained, or was, without an adapter."""
    return not hasattr(model, "peft_config")


def train_all(base: Any, gradient_checkpointing: bool) -> Any:
    """Make a frozen base trainable, in place, and return it."""
    for parameter in text_parameters(base).values():
        parameter.requires_grad_(True)
    if gradient_checkpointing:
        with quiet():
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return base


def text_parameters(base: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that text passes, by name; tied ones once."""
    if base.config.get_text_config() is base.config:
        return dict(base.named_parameters())
    parts = (base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings())
    own = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    return {name: parameter for name, parameter in base.named_parameters() if id(parameter) in own}


def linear_weights(base: Any) -> frozenset[str]:
    """Return the names of the weights of linear layers but the head, whose moments may have a low rank."""
    return frozenset(f"{path}.weight" for path in shapes_of(base).quantizable())


def write_weights(model: Any, folder: Path) -> None:
    """Write a whole model in Transformers' format."""
    with quiet():
        model.save_pretrained(str(folder))


def copy_weights(model: Any, copies: bool = True) -> Callable[[Path], None]:
    """Take a whole model off the device; returns a function that writes it as `write_weights` does.

    Args:
        model: The model.
        copies: Whether tensors on the host are copied too, so that later steps do not change them.
    """
    taken: dict[int, torch.Tensor] = {}  # by address: tied weights stay one
    weights = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in taken:
            taken[tensor.data_ptr()] = tensor.detach().to("cpu", copy=copies)
        weights[name] = taken[tensor.data_ptr()]

    def write(folder: Path) -> None:
        with quiet():
            model.save_pretrained(str(folder), state_dict=weights)

    return write


def save_full(model: Any, tokenizer: Any, chat_template: str | None, stop_ids: set[int], folder: Path) -> None:
    """Write a whole model with the tokenizer and the chat template that it was trained with.

    It decodes greedily, as it is evaluated, and ends at the stop tokens of the training and of the base.
    """
    write_weights(model, folder)
    kept = model.generation_config
    ids = {name: found for name in ("bos_token_id", "pad_token_id") if (found := getattr(kept, name)) is not None}
    stops = sorted(stop_ids | base_stop_ids(kept, "generation_config.json"))
    write_json(folder / "generation_config.json", ids | {"do_sample": False, "eos_token_id": stops})
    own_template = tokenizer.chat_template
    with quiet():
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(str(folder))
        tokenizer.chat_template = own_template


def load_weights(model: Any, folder: Path) -> None:
    """Replace the weights of a model by those of a folder that `write_weights` wrote, in place.

    Raises:
        UserError: they are damaged, or of another model.
    """
    with quiet(), reading(f"{folder}: the weights do not load", FIX):
        other = type(model).from_pretrained(
            str(folder), dtype=model.dtype, local_files_only=True, trust_remote_code=False
        )
    _exchange(other, model)


@torch.no_grad()
def _exchange(source: Any, target: Any) -> None:
    """Exchange all weights of two models of the same architecture, in place.

    Raises:
        UserError: they differ in shape.
    """
    given, taken = dict(source.named_parameters()), dict(target.named_parameters())
    differ = sorted(name for name in given.keys() | taken.keys() if _shape(given, name) != _shape(taken, name))
    if differ:
        raise UserError(f"{len(differ)} weights are of another shape, first {differ[0]}", "name the same base")
    for name, parameter in taken.items():
        before = parameter.detach().clone()
        parameter.copy_(given[name])
        given[name].copy_(before)


def _shape(parameters: dict[str, torch.nn.Parameter], name: str) -> tuple[int, ...] | None:
    return tuple(parameters[name].shape) if name in parameters else None


@contextmanager
def weights_of(model: Any, load_base: Callable[[], Any]) -> Iterator[None]:
    """Within the context, a model has the weights of its base; its own are in the host's memory meanwhile.

    Args:
        model: model that was trained whole.
        load_base: function that loads the base, to the host's memory.
    """
    other = load_base()
    _exchange(other, model)
    try:
        yield
    finally:
        _exchange(other, model)


def folder_source(folder: Path) -> BaseSource:
    """Return a folder of weights as the source of a base."""
    return BaseSource("folder", str(folder), str(folder))
