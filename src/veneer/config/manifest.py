"""manifest.json of a checkpoint: its step, what its run began with, and a checksum of each of its files.

The files' names are part of the contract of a run's folder. What is in them is training's (training/checkpoint.py);
whoever takes an adapter from a checkpoint only has to know that it is whole.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError
from veneer.config.files import file_sha256, read_json
from veneer.config.folder import write_json

# Of these a checkpoint has the adapter's files, or the configuration of a whole model.
CONFIG = "config.json"
ADAPTER, ADAPTER_CONFIG, OPTIMIZER, RNG, MANIFEST = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "rng.safetensors",
    "manifest.json",
)
OWN = "own_sha256"  # of the manifest's other entries


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write a checkpoint's manifest, after all of its other files.

    Args:
        folder: Folder of the checkpoint.
        facts: step, began_with and loss_scale.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file())
    manifest = facts | {"sha256": {file.name: file_sha256(file) for file in files}}
    write_json(folder / MANIFEST, manifest | {OWN: _own_sha256(manifest)})


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, all of whose files are as they were written.

    Raises:
        UserError: A file is damaged, or the manifest is: it leaves a file out, or is of another step.
    """
    damaged = f"delete {path} to go on from the checkpoint before"
    manifest = read_json(path / MANIFEST, "step", "loss_scale", "began_with", "sha256", fix=damaged)
    try:
        listed, before = dict(manifest["sha256"]), dict(manifest["began_with"])
        step = int(path.name.removeprefix("step-"))
    except (ValueError, TypeError):
        raise UserError(f"{path / MANIFEST}: missing or damaged", damaged) from None
    own = manifest.pop(OWN, None)
    weights = (CONFIG,) if CONFIG in listed else (ADAPTER, ADAPTER_CONFIG)
    unlisted = [name for name in (*weights, OPTIMIZER, RNG) if name not in listed]
    if unlisted or not before or manifest.get("step") != step:
        why = f"it leaves out {unlisted[0]}" if unlisted else f"it is of step {manifest.get('step')}"
        raise UserError(f"{path / MANIFEST}: damaged: {why if before else 'it says nothing of base and data'}", damaged)
    if own != _own_sha256(manifest):
        raise UserError(f"{path / MANIFEST}: damaged: its own checksum is another", damaged)
    for name, checksum in listed.items():
        if (found := file_sha256(path / name)) is None or found != checksum:
            raise UserError(f"{path / name}: missing or damaged", damaged)
    return dict(manifest)


def _own_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
