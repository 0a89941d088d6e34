"""Identifies a base by hashes of samples of its weights and of its configuration.

The fingerprint of the weights is taken from samples of every tensor, 32 of 4 KiB each: reading all of a 16 GB model
would take half a minute at every start. A model that was trained further differs in every tensor and is always
detected; a single changed byte may not be, but `veneer certify` detects it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from veneer.config import Quantization, UserError
from veneer.config.files import file_sha256, read_json
from veneer.model.locate import BaseSource, local_folder
from veneer.model.shards import ALL_DTYPES, DamagedError, Piece, UnknownTypeError, find_files, read_header

SAMPLES, SAMPLE_BYTES = 32, 4096
IGNORED_KEYS = ("_name_or_path", "transformers_version")  # in config.json, but not properties of the model


def fingerprint(source: BaseSource) -> str | None:
    """Return SHA-256 of names, shapes, dtypes and samples of all of a base's tensors; None without local safetensors.

    It does not depend on how tensors are divided among files.
    """
    folder = local_folder(source)
    try:
        files = find_files(BaseSource("folder", str(folder), source.name)) if folder is not None else None
        pieces = {piece.name: piece for file in files or () for piece in read_header(file, ALL_DTYPES)}
    except (DamagedError, UnknownTypeError):
        return None
    if not pieces:
        return None
    digest = hashlib.sha256()
    for _, piece in sorted(pieces.items()):
        digest.update(f"{piece.name} {ALL_DTYPES[piece.kind]} {piece.shape}\n".encode())
        _sample(piece, digest)
    return digest.hexdigest()


def trained_sha256(folder: Path) -> str | None:
    """Return what identifies trained weights: SHA-256 of an adapter's file, or the fingerprint of a whole model."""
    if (folder / "adapter_config.json").is_file():
        return file_sha256(folder / "adapter_model.safetensors")
    return fingerprint(BaseSource("folder", str(folder), str(folder)))


def config_sha256(source: BaseSource) -> str | None:
    """Return SHA-256 of the model's properties in a base's config.json; None if the file is not local."""
    if (config := _config(source)) is None:
        return None
    properties = {key: value for key, value in config.items() if key not in IGNORED_KEYS}
    return hashlib.sha256(json.dumps(properties, sort_keys=True).encode()).hexdigest()


def stored_quantization(source: BaseSource) -> Quantization | None:
    """Return how a base's own files are quantized to 4 bits; None: they are not, or are not local."""
    config = (_config(source) or {}).get("quantization_config") or {}
    if not config.get("load_in_4bit"):
        return None
    kind, twice = config.get("bnb_4bit_quant_type", "fp4"), bool(config.get("bnb_4bit_use_double_quant"))
    return Quantization(quant_type=kind, double_quant=twice)


def _config(source: BaseSource) -> dict[str, Any] | None:
    """Read config.json of a base; None if it is not local, or is damaged."""
    folder = local_folder(source)
    try:
        return read_json(folder / "config.json") if folder is not None else None
    except UserError:
        return None


def _sample(piece: Piece, digest: Any) -> None:
    step = max(SAMPLE_BYTES, (piece.size - SAMPLE_BYTES) // (SAMPLES - 1))
    with piece.file.open("rb") as file:
        for at in range(0, piece.size, step):
            file.seek(piece.offset + at)
            digest.update(file.read(min(SAMPLE_BYTES, piece.size - at)))
