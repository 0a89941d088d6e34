"""A resumable state on disk: adapter, optimizer, random numbers and position, with checksums.

A checkpoint folder appears whole or not at all, and its adapter is in PEFT's format, so that it can be used as it
is. The position is the number of steps done: order, learning rate and masks follow from it (data/batch.py,
training/schedule.py). Everything is safetensors or JSON; nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from veneer.config import UserError
from veneer.config.files import read_json
from veneer.config.folder import remove, whole_folder, write_json
from veneer.model.quiet import quiet
from veneer.training.optimizer import get_state, set_state

ADAPTER, ADAPTER_CONFIG, OPTIMIZER, RNG, MANIFEST = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "rng.safetensors",
    "manifest.json",
)
OWN = "own_sha256"  # of the manifest's other entries


def save(
    folder: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    updated: dict[str, torch.nn.Parameter],
    scaler: torch.amp.GradScaler,
    began_with: Mapping[str, str | None],
) -> Path:
    """Write the state after `step` steps into `folder`/step-NNNNNN.

    Args:
        folder: Folder of the run's checkpoints.
        step: Steps done.
        model, optimizer, scaler: What is written.
        updated: What the optimizer updates, by name.
        began_with: A hash of the base and of each other input that decides the training, by name.
    """
    path = path_of(folder, step)
    with whole_folder(path) as unfinished:
        with quiet():
            model.save_pretrained(str(unfinished), save_embedding_layers=False)
        save_file(get_state(optimizer, _names(updated)), unfinished / OPTIMIZER)
        save_file(_rng_state(), unfinished / RNG)
        files = sorted(file for file in unfinished.iterdir() if file.is_file())
        checksums = {file.name: _sha256(file) for file in files}
        manifest = {
            "step": step,
            "began_with": dict(began_with),
            "loss_scale": scaler.state_dict(),
            "sha256": checksums,
        }
        write_json(unfinished / MANIFEST, manifest | {OWN: _own_sha256(manifest)})
    return path


def path_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The number of steps after which a checkpoint was written, by its name."""
    return int(path.name.removeprefix("step-"))


def load(
    path: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    updated: dict[str, torch.nn.Parameter],
    scaler: torch.amp.GradScaler,
    began_with: Mapping[str, str | None],
) -> int:
    """Restore what `save` wrote, in place; returns the number of steps done. Arguments as of `save`.

    Raises:
        UserError: A file is damaged, or the base or the data is not what the run began with.
    """
    from peft import set_peft_model_state_dict

    manifest = verified(path)
    before = manifest["began_with"]
    if other := [what for what in sorted({*before, *began_with}) if before.get(what) != began_with.get(what)]:
        raise UserError(
            f"{path}: not what this run began with: {', '.join(other)}",
            "restore that, or start a new run in another train.output_dir",
        )
    with quiet():
        set_peft_model_state_dict(model, load_file(path / ADAPTER))
    set_state(optimizer, _names(updated), load_file(path / OPTIMIZER))
    if scaler.is_enabled():
        scaler.load_state_dict(manifest["loss_scale"])
    rng = load_file(path / RNG)
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return int(manifest["step"])


def verified(path: Path) -> dict[str, Any]:
    """Check a checkpoint's files against its manifest, and return that.

    Raises:
        UserError: A file is damaged, or the manifest is: it leaves a file out, or is of another step.
    """
    damaged = f"delete {path} to go on from the checkpoint before"
    manifest = read_json(path / MANIFEST, "step", "loss_scale", "began_with", "sha256", fix=damaged)
    try:
        listed, before = dict(manifest["sha256"]), dict(manifest["began_with"])
        step = step_of(path)
    except (ValueError, TypeError):
        raise UserError(f"{path / MANIFEST}: missing or damaged", damaged) from None
    own = manifest.pop(OWN, None)
    unlisted = [name for name in (ADAPTER, ADAPTER_CONFIG, OPTIMIZER, RNG) if name not in listed]
    if unlisted or not before or manifest.get("step") != step:
        why = f"it leaves out {unlisted[0]}" if unlisted else f"it is of step {manifest.get('step')}"
        raise UserError(f"{path / MANIFEST}: damaged: {why if before else 'it says nothing of base and data'}", damaged)
    if own != _own_sha256(manifest):
        raise UserError(f"{path / MANIFEST}: damaged: its own checksum is another", damaged)
    for name, checksum in listed.items():
        if not (path / name).is_file() or _sha256(path / name) != checksum:
            raise UserError(f"{path / name}: missing or damaged", damaged)
    return dict(manifest)


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint, or None."""
    found = _all(folder)
    return found[-1] if found else None


def drop_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in _all(folder)[:-keep]:
        remove(path)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=step_of)


def _names(updated: dict[str, torch.nn.Parameter]) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in updated.items()}


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _own_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
