"""What a base is known by again: samples of its weights, and its configuration.

The fingerprint of the weights is taken from samples of every tensor, 32 stretches of 4 KiB each: reading all of a 16 GB
model would take half a minute at every start. A model that was trained further differs in every tensor and is found for
certain; a single changed byte may not be, which is what `veneer certify` is for.
"""

import hashlib
import json
from typing import Any

from veneer.config import Quantization, UserError
from veneer.config.files import read_json
from veneer.model.locate import BaseSource, local_folder
from veneer.model.shards import ALL_DTYPES, DamagedError, Piece, UnknownTypeError, find_files, read_header

SAMPLES, SAMPLE_BYTES = 32, 4096
NO_MATTER = ("_name_or_path", "transformers_version")  # in config.json: what says nothing of the model


def fingerprint(source: BaseSource) -> str | None:
    """SHA-256 of names, shapes, dtypes and samples of all of a base's tensors; None where it has no safetensors here.

    How the tensors are spread over files does not matter.
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


def config_sha256(source: BaseSource) -> str | None:
    """SHA-256 of what a base's config.json says of the model; None where it is not here."""
    if (config := _config(source)) is None:
        return None
    kept = {key: value for key, value in config.items() if key not in NO_MATTER}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def stored_quantization(source: BaseSource) -> Quantization | None:
    """How a base's own files are quantized to 4 bits, by its configuration; None: they are not, or it is not here."""
    config = (_config(source) or {}).get("quantization_config") or {}
    if not config.get("load_in_4bit"):
        return None
    kind, twice = config.get("bnb_4bit_quant_type", "fp4"), bool(config.get("bnb_4bit_use_double_quant"))
    return Quantization(quant_type=kind, double_quant=twice)


def _config(source: BaseSource) -> dict[str, Any] | None:
    """config.json of a base; None where it is not here, or is damaged."""
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
