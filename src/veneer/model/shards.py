"""The safetensors files of a checkpoint, and where each tensor lies in them.

The format is a length, a JSON header and the tensors' bytes without holes, so that a file which ends early, or is no
safetensors file at all, is told from its header and its size before anything is loaded. The header is read here and
not by the safetensors library, since only its offsets let several threads read large pieces ahead (reader.py).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from veneer.config.files import read_json, reason
from veneer.model.locate import BaseSource

# Of safetensors' names. A file with a type that is not here is left to Transformers.
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
    """A file that is cut off, or not what its name says."""


class UnknownTypeError(Exception):
    """A file holds a type of number that is not in DTYPES."""


class Piece(NamedTuple):
    """A tensor in a file.

    Attributes:
        name, file: Which tensor, and where.
        offset, size: Of its bytes in the file.
        kind: Its type, as safetensors names it.
        shape: Its shape.
    """

    name: str
    file: Path
    offset: int
    size: int
    kind: str
    shape: tuple[int, ...]


def find_files(source: BaseSource) -> list[Path] | None:
    """The safetensors files of a base model, fetched from the hub if need be; None where it has none, or no access.

    Raises:
        DamagedError: The index of a sharded checkpoint cannot be read or names a file that is not there.
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
        told = f"{len(missing)} of them are missing: {', '.join(missing[:3])}"
        raise DamagedError(f"{INDEX} names {len(files)} files, {told}")
    return files


def _hub_files(source: BaseSource) -> list[Path] | None:
    from huggingface_hub import hf_hub_download, snapshot_download

    def fetch(name: str) -> Path | None:
        try:
            given: dict[str, Any] = {"revision": source.revision, "local_files_only": source.only_local}
            return Path(hf_hub_download(source.location, name, **given))
        except (OSError, ValueError):
            return None  # Transformers finds out, and says, whether it is the name, the network or the access.

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
    """All tensors of a checkpoint, in the order that Transformers loads them in.

    Raises:
        DamagedError: A file is cut off or is no safetensors file, or its tensors overlap or leave holes.
        UnknownTypeError: A file holds numbers of a type that is not in DTYPES.
    """
    pieces = {piece.name: piece for file in files for piece in read_header(file)}
    return sorted(pieces.values(), key=lambda piece: _order(piece.name))


def _order(name: str) -> list[tuple[int, int, str]]:
    parts = name.split(".")
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def read_header(file: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> list[Piece]:
    """The tensors of one file, which are of these types. Raises as `read_headers`."""
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
    """The header of a file and where the tensors begin."""
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
