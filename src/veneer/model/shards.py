"""Reads the headers of a checkpoint's safetensors files: the location of each tensor in them.

The format is a length, a JSON header and the tensors' bytes without gaps, so that a truncated file, or one that is no
safetensors file at all, is detected by its header and its size before anything is loaded. The header is read here and
not by the safetensors library, since several threads need the offsets to read large pieces ahead (reader.py).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from veneer.config.files import read_json, reason
from veneer.model.locate import BaseSource

# By safetensors' names. Transformers loads files with other dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ALL_DTYPES = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
LONGEST_HEADER_BYTES = 100 * 2**20  # the safetensors library's own limit
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class DamagedError(ValueError):
    """Raised for a file that is truncated or invalid."""


class UnknownTypeError(Exception):
    """Raised for a file with a dtype that is not in DTYPES."""


class Piece(NamedTuple):
    """A tensor in a file.

    Attributes:
        name, file: name of the tensor, and its file.
        offset, size: position and number of its bytes in the file.
        kind: dtype, as safetensors names it.
        shape: shape of the tensor.
    """

    name: str
    file: Path
    offset: int
    size: int
    kind: str
    shape: tuple[int, ...]


def find_files(source: BaseSource) -> list[Path] | None:
    """Find the safetensors files of a base model, fetched from the hub if needed; None without any, or without access.

    Raises:
        DamagedError: the index of a sharded checkpoint cannot be read or names a file that is not there.
    """
    if source.kind == "hub":
        return _hub_files(source)
    folder = Path(source.location)
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        return None
    files = [folder / name for name in _shards(folder / INDEX)]
    if missing := [file.name for file in files if not file.is_file()]:
        detail = f"{len(missing)} of them are missing: {', '.join(missing[:3])}"
        raise DamagedError(f"{INDEX} names {len(files)} files, {detail}")
    return files


def _hub_files(source: BaseSource) -> list[Path] | None:
    from huggingface_hub import hf_hub_download, snapshot_download

    def fetch(name: str) -> Path | None:
        try:
            given: dict[str, Any] = {"revision": source.revision, "local_files_only": source.only_local}
            return Path(hf_hub_download(source.location, name, **given))
        except (OSError, ValueError):
            return None  # Transformers reports whether the name, the network or the access is at fault.

    if (whole := fetch(WHOLE)) is not None:
        return [whole]
    if (index := fetch(INDEX)) is None:
        return None
    names = _shards(index)
    files = [index.parent / name for name in names]
    if not all(file.is_file() for file in files) and not source.only_local:
        try:
            snapshot_download(source.location, revision=index.parent.name, allow_patterns=names)
        except (OSError, ValueError):
            return None
    return files if all(file.is_file() for file in files) else None


def _shards(index: Path) -> list[str]:
    try:
        names = {str(name) for name in read_json(index, "weight_map")["weight_map"].values()}
    except (ValueError, AttributeError) as error:
        raise DamagedError(f"{index.name} is not an index of files ({reason(error)})") from None
    if outside := sorted(name for name in names if Path(name).name != name):
        raise DamagedError(f"{index.name} names {outside[0]}, which is no file beside it")
    return sorted(names)


def read_headers(files: Iterable[Path]) -> list[Piece]:
    """Return all tensors of a checkpoint, in the order in which Transformers loads them.

    Raises:
        DamagedError: a file is truncated or is no safetensors file, or its tensors overlap or leave gaps.
        UnknownTypeError: a file has a dtype that is not in DTYPES.
    """
    pieces = {piece.name: piece for file in files for piece in read_header(file)}
    return sorted(pieces.values(), key=lambda piece: _order(piece.name))


def _order(name: str) -> list[tuple[int, int, str]]:
    parts = name.split(".")
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def read_header(file: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> list[Piece]:
    """Return the tensors of one file, of these dtypes. It raises what `read_headers` raises."""
    entries, start = _entries(file)
    held = file.stat().st_size - start
    pieces = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (first, last) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(number) is int for number in (*shape, first, last)):
                raise TypeError
            size = last - first
        except (KeyError, TypeError, ValueError):
            raise DamagedError(f"{file.name} is damaged: its header's entry of {name} cannot be read") from None
        if kind not in dtypes:
            raise UnknownTypeError(kind)
        if first < 0 or min(shape, default=0) < 0 or size != torch.Size(shape).numel() * dtypes[kind].itemsize:
            raise DamagedError(f"{file.name} is damaged: {name} has {size} bytes, which is not its shape's size")
        if last > held:
            raise DamagedError(f"{file.name} is cut off: it holds {held:,} bytes of weights, {name} ends at {last:,}")
        pieces.append(Piece(name, file, start + first, size, kind, shape))
    at = start
    for piece in sorted(pieces, key=lambda piece: (piece.offset, piece.size)):
        if piece.offset != at:
            raise DamagedError(f"{file.name} is damaged: {piece.name} does not begin where the tensor before it ends")
        at += piece.size
    return pieces


def _entries(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file and the offset of its tensors."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = handle.read(length) if length <= LONGEST_HEADER_BYTES else b""
    if not header or len(header) < length:
        raise DamagedError(f"{file.name} is not a safetensors file, or is cut off within its header")
    try:
        entries = json.loads(header)
        if not isinstance(entries, dict):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise DamagedError(f"{file.name} is damaged: its header is not JSON") from None
    return entries, 8 + length
