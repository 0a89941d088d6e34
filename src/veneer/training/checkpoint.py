"""A resumable state on disk: adapter, optimizer, random numbers and position, with checksums.

A checkpoint folder appears whole or not at all, and what was trained can be used as it is: an adapter in PEFT's format,
or a whole model in Transformers'. The position is the number of steps done: order, learning rate and masks follow from
it (data/batch.py, training/schedule.py). Everything is safetensors or JSON; nothing is unpickled.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from veneer.config import UserError
from veneer.config.folder import remove, whole_folder
from veneer.config.manifest import OPTIMIZER, RNG, read_manifest, write_manifest
from veneer.config.notify import notify
from veneer.machine.device import rng_state, set_rng_state
from veneer.model.attach import copy_adapter, set_adapter
from veneer.model.full import copy_weights, is_full, load_weights
from veneer.training.divergence import DivergenceWatch, is_good
from veneer.training.optimizer import MASTER, get_state, layout_of, set_state, split_state


@dataclass(frozen=True)
class TrainingState:
    """The state of a training that a checkpoint keeps.

    Attributes:
        model: The PEFT model, or the model that is trained whole.
        optimizer, scaler: The optimizer and the scaler of its gradients.
        updated: Parameters that the optimizer updates, by name.
        began_with: A hash of the base and of each other input that decides the training, by name.
        divergence: Judge of the steps, which knows the factor of their rate.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    updated: dict[str, torch.nn.Parameter]
    scaler: torch.amp.GradScaler
    began_with: Mapping[str, str | None]
    divergence: DivergenceWatch

    @property
    def names(self) -> dict[torch.Tensor, str]:
        """The names of the updated parameters."""
        return {parameter: name for name, parameter in self.updated.items()}

    def bytes_of_copy(self) -> int:
        """Return the bytes of the trained weights and of the optimizer's states."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in (*trained, *states) if isinstance(value, torch.Tensor))


@dataclass(frozen=True)
class Snapshot:
    """A state on the host, ready to be written; with `copies`, later steps change nothing of it.

    Attributes:
        step: Steps done.
        write_weights: Function that writes the trained weights into a folder.
        optimizer, rng: States of the optimizer and of the random number generators.
        facts: Entries of the manifest beside checksums.
        bytes: Bytes of the tensors.
    """

    step: int
    write_weights: Callable[[Path], None]
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]
    facts: dict[str, Any]
    bytes: int


def take(step: int, state: TrainingState, copies: bool = True) -> Snapshot:
    """Take the state after `step` steps off the device.

    Args:
        step: Steps done.
        state: The state.
        copies: Whether large tensors on the host are copied too, so that training may go on while they are written.
    """
    master = state.updated.get(MASTER)
    facts = {
        "step": step,
        "began_with": dict(state.began_with),
        "loss_scale": state.scaler.state_dict(),
        "layout": None if master is None else layout_of(state.model, master),
        "divergence": state.divergence.state_dict(),
    }
    return Snapshot(
        step,
        copy_weights(state.model, copies) if is_full(state.model) else copy_adapter(state.model),
        get_state(state.optimizer, state.names, copies),
        rng_state(),
        facts,
        state.bytes_of_copy(),
    )


def write(folder: Path, snapshot: Snapshot) -> None:
    """Write a state into `folder`/step-NNNNNN."""
    with whole_folder(path_of(folder, snapshot.step)) as unfinished:
        snapshot.write_weights(unfinished)
        save_file(snapshot.optimizer, unfinished / OPTIMIZER)
        save_file(snapshot.rng, unfinished / RNG)
        write_manifest(unfinished, snapshot.facts)


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """Return the number of steps after which a checkpoint was written, by its name."""
    return int(path.name.removeprefix("step-"))


def load(path: Path, state: TrainingState) -> int:
    """Restore what `save` wrote, in place; returns the number of steps done.

    Raises:
        UserError: A file is damaged, or the base or the data is not what the run began with.
    """
    manifest = read_manifest(path)
    before, began_with = manifest["began_with"], state.began_with
    if other := [what for what in sorted({*before, *began_with}) if before.get(what) != began_with.get(what)]:
        raise UserError(
            f"{path}: not what this run began with: {', '.join(other)}",
            "restore that, or start a new run in another train.output_dir",
        )
    _set_weights(state.model, path)
    tensors = load_file(path / OPTIMIZER)
    if MASTER not in state.updated and (layout := manifest.get("layout")):
        tensors = split_state(tensors, layout, state.updated)
    set_state(state.optimizer, state.names, tensors)
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(manifest["loss_scale"])
    state.divergence.load_state_dict(manifest.get("divergence"))
    set_rng_state(load_file(path / RNG))
    return int(manifest["step"])


def is_flat(path: Path) -> bool:
    """Return whether the optimizer's state is that of an engine's one flat parameter."""
    with safe_open(path / OPTIMIZER, framework="pt") as file:
        return any(name.startswith(f"{MASTER}/") for name in file.keys())  # noqa: SIM118 - it is no dict


def load_adapter_alone(path: Path, model: Any) -> None:
    """Restore the adapter of a checkpoint, in place, and nothing else.

    Raises:
        UserError: A file is damaged.
    """
    read_manifest(path)
    _set_weights(model, path)


def _set_weights(model: Any, path: Path) -> None:
    if is_full(model):
        load_weights(model, path)
    else:
        set_adapter(model, path)


def latest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None; damaged ones after it are told, and left as they are.

    Raises:
        UserError: All are damaged.
    """
    found = all_in(folder)
    for path in reversed(found):
        try:
            read_manifest(path)
        except UserError as error:
            if path == found[0]:
                raise
            notify(f"{str(error).splitlines()[0]}; training goes on from the checkpoint before it", where=str(path))
            continue
        return path
    return None


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint, whole or not; None: there is none."""
    found = all_in(folder)
    return found[-1] if found else None


def to_roll_back_to(folder: Path, tried: int | None) -> Path | None:
    """Return the newest whole checkpoint that was written while all was well; None: there is none.

    Args:
        folder: Folder of the run's checkpoints.
        tried: Step of the checkpoint that the last rollback went back to: where it is still the newest, an older one is
            better, if there is one.
    """
    good = []
    for path in all_in(folder):
        try:
            if is_good(read_manifest(path).get("divergence")):
                good.append(path)
        except UserError:
            continue  # it is told when a run is resumed
    if len(good) > 1 and step_of(good[-1]) == tried:
        good.pop()
    return good[-1] if good else None


def drop_after(folder: Path, step: int) -> None:
    """Delete the checkpoints after a step, with which training goes on."""
    for path in all_in(folder):
        if step_of(path) > step:
            remove(path)


def drop_old(folder: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints, and that of the step `best`."""
    for path in all_in(folder)[:-keep]:
        if step_of(path) != best:
            remove(path)


def all_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, whole or not, the oldest first."""
    return sorted(folder.glob("step-*"), key=step_of)
