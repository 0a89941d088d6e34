"""A base's 4-bit weights, kept on disk, so that the next load reads a third of the bytes and quantizes nothing.

A copy is a folder with the quantized model's tensors in one safetensors file, in the order in which they are loaded,
and a manifest: what it was made from and how, and a checksum of every 4 MiB. It lies beside the base, in `.veneer`,
where that can be written, else in Veneer's cache folder. Nothing in it is executed or unpickled.

A copy is used only if the base's files are those it was made from (name, size, time, and samples of their bytes), the
settings are the same, and bitsandbytes and the kind of device are, since another may round differently. Anything else
is made anew, with a notice. A copy that cannot be written is one too, and training goes on: it only saves time.
"""

import hashlib
import json
import shutil
import time
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from veneer.config import Quantization
from veneer.config.cache import cache_folder
from veneer.config.files import read_json, reason
from veneer.config.folder import clear_dead, whole_folder, write_json
from veneer.config.notify import notify
from veneer.model.locate import BaseSource
from veneer.model.reader import CHUNK
from veneer.model.shards import DTYPES, DamagedError, Piece, UnknownTypeError, read_headers

FORMAT = 1
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
SAMPLES, SAMPLE_BYTES = 64, 4096


class CopyOnDisk(NamedTuple):
    """A copy that was found and fits: its folder, its tensors, and the CRC-32 of each one's chunks."""

    folder: Path
    pieces: list[Piece]
    checksums: dict[str, list[int]]


class Copy(NamedTuple):
    """The copy that a run can use: what it must be made of, and where it may lie.

    Attributes:
        folders: folders it may lie in, the better first.
        origin: content of the manifest that it must have.
    """

    folders: list[Path]
    origin: dict[str, Any]

    @staticmethod
    def of(
        source: BaseSource, files: list[Path], quantization: Quantization, dtype: torch.dtype, device: str
    ) -> "Copy":
        """Of a base's files as a run quantizes them."""
        kind = quantization.quant_type + ("-double" if quantization.double_quant else "")
        precision = str(dtype).removeprefix("torch.")
        entry = f"{kind}-{precision}-{device}"
        where = source.location if source.kind == "hub" else str(Path(source.location).resolve())
        name = f"{Path(where).name}-{hashlib.sha256(f'{where} {source.revision}'.encode()).hexdigest()[:12]}"
        folders = [cache_folder() / "quantized" / name / entry]
        if source.kind != "hub":
            folders.insert(0, Path(source.location) / ".veneer" / entry)
        how = {"kind": kind, "dtype": precision, "device": device, "bitsandbytes": metadata.version("bitsandbytes")}
        prints = [_print(file) for file in (files[0].parent / "config.json", *files)]
        return Copy(folders, {"format": FORMAT, "chunk_bytes": CHUNK, **how, "files": prints})

    def find(self) -> CopyOnDisk | None:
        """The copy, if there is one that fits. One that does not gives a notice."""
        for folder in self.folders:
            try:
                if (folder / MANIFEST).is_file():
                    return self._open(folder)
            except (OSError, ValueError, TypeError, KeyError, AttributeError, UnknownTypeError) as error:
                notify_unusable(folder, reason(error))
        return None

    def _open(self, folder: Path) -> CopyOnDisk:
        manifest = read_json(folder / MANIFEST, "origin", "checksums")
        for key, value in self.origin.items():
            if manifest["origin"].get(key) != value:
                what = "the base's files have changed since" if key == "files" else f"made with another {key}"
                raise DamagedError(what)
        pieces = read_headers([folder / WEIGHTS])
        checksums = {str(name): [int(sum_) for sum_ in sums] for name, sums in manifest["checksums"].items()}
        if {piece.name: -(-piece.size // CHUNK) for piece in pieces} != {n: len(sums) for n, sums in checksums.items()}:
            raise DamagedError("manifest and weights do not belong together")
        return CopyOnDisk(folder, pieces, checksums)

    def write(self, base: Any) -> None:
        """Keep a quantized model in the first folder that takes it; where none does, say so."""
        tied = getattr(base, "all_tied_weights_keys", None) or {}
        tensors = {name: tensor.detach() for name, tensor in base.state_dict().items() if name not in tied}
        needed = sum(tensor.nbytes for tensor in tensors.values())
        reasons = []
        for folder in self.folders:
            started = time.perf_counter()
            try:
                clear_dead(folder)
                _require_space(folder, needed)
                with whole_folder(folder) as unfinished:
                    checksums = _write(tensors, unfinished / WEIGHTS)
                    write_json(unfinished / MANIFEST, {"origin": self.origin, "checksums": checksums})
            except OSError as error:
                reasons.append(f"{folder}: {error.strerror or error}")
            else:
                seconds = time.perf_counter() - started
                size = f"{needed / 1e9:.1f} GB, {seconds:.0f} s"
                notify(f"kept the 4-bit weights in {folder} ({size})", "info", str(folder))
                return
        notify(f"the 4-bit weights could not be kept ({'; '.join(reasons)})", where="quantization.cache")


def notify_unusable(folder: Path, reason: str) -> None:
    """Say that a copy is not used, and why."""
    notify(f"the 4-bit weights kept in {folder} are not used: {reason}; making them anew", where=str(folder))


def _print(file: Path) -> dict[str, Any]:
    """What tells a file from another: of a hub's file the name of its blob, too, which is its content's hash."""
    state = file.stat()
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as handle:
        for number in range(SAMPLES):
            handle.seek(number * max(0, state.st_size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(handle.read(SAMPLE_BYTES))
    names = {"name": file.name, "content": file.resolve().name}
    return names | {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "samples": digest.hexdigest()}


def _require_space(folder: Path, needed: int) -> None:
    parent = folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed")


def _write(tensors: dict[str, torch.Tensor], file: Path) -> dict[str, list[int]]:
    """Write a safetensors file, a chunk at a time; returns each tensor's checksums."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        return {name: _write_tensor(tensor, handle) for name, tensor in tensors.items()}


def _write_tensor(tensor: torch.Tensor, handle: BinaryIO) -> list[int]:
    bytes_ = tensor.contiguous().reshape(-1).view(torch.uint8)
    sums = []
    for start in range(0, len(bytes_), CHUNK):
        array: Any = bytes_[start : start + CHUNK].cpu().numpy()
        view = memoryview(array)
        sums.append(zlib.crc32(view))
        handle.write(view)
    return sums
