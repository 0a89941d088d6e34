"""Caches a base's 4-bit weights on disk, so that the next load reads a third of the bytes and quantizes nothing.

A copy is a folder with the quantized model's tensors in one safetensors file, in the order of loading, and a manifest:
the files and settings that it was made from, and a checksum of every 4 MiB. It is stored beside the base, in
`.veneer`, if that is writable, else in Veneer's cache folder. Nothing in it is executed or unpickled.

A copy is used only if the base's files (name, size, time, and samples of their bytes), the settings, the version of
bitsandbytes and the kind of device are the same, since others may round differently. Else it is made again, with a
notice. A failed write gives a notice too, and training goes on: the copy only saves time.
"""

import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from veneer.config import Quantization
from veneer.config.cache import cache_folder
from veneer.config.files import read_json, reason
from veneer.config.folder import clear_dead, whole_folder, write_json
from veneer.config.notify import notify
from veneer.config.versions import version_of
from veneer.model.locate import BaseSource
from veneer.model.reader import CHUNK
from veneer.model.shards import DTYPES, DamagedError, Piece, UnknownTypeError, read_headers

FORMAT = 1
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
SAMPLES, SAMPLE_BYTES = 64, 4096
ENTRY_BYTES = 256  # of a header, for a tensor with its name


class CachedWeights(NamedTuple):
    """A valid copy on disk: its folder, its tensors, and the CRC-32 of their chunks."""

    folder: Path
    pieces: list[Piece]
    checksums: dict[str, list[int]]


class QuantizedCache(NamedTuple):
    """The copy that a run can use.

    Attributes:
        folders: possible folders, the preferred first.
        origin: files and settings that its manifest must name.
    """

    folders: list[Path]
    origin: dict[str, Any]

    @staticmethod
    def of(
        source: BaseSource, files: list[Path], quantization: Quantization, dtype: torch.dtype, device: str
    ) -> "QuantizedCache":
        """Describe the copy of a base's files as a run quantizes them."""
        kind = quantization.quant_type + ("-double" if quantization.double_quant else "")
        precision = str(dtype).removeprefix("torch.")
        entry = f"{kind}-{precision}-{device}"
        where = source.location if source.kind == "hub" else str(Path(source.location).resolve())
        name = f"{Path(where).name}-{hashlib.sha256(f'{where} {source.revision}'.encode()).hexdigest()[:12]}"
        folders = [cache_folder() / "quantized" / name / entry]
        if source.kind != "hub":
            folders.insert(0, Path(source.location) / ".veneer" / entry)
        how = {"kind": kind, "dtype": precision, "device": device, "bitsandbytes": version_of("bitsandbytes")}
        prints = [_print(file) for file in (files[0].parent / "config.json", *files)]
        return QuantizedCache(folders, {"format": FORMAT, "chunk_bytes": CHUNK, **how, "files": prints})

    def find(self) -> CachedWeights | None:
        """Find a valid copy; an invalid one gives a notice."""
        for folder in self.folders:
            try:
                if (folder / MANIFEST).is_file():
                    return self._open(folder)
            except (OSError, ValueError, TypeError, KeyError, AttributeError, UnknownTypeError) as error:
                notify_unusable(folder, reason(error))
        return None

    def _open(self, folder: Path) -> CachedWeights:
        manifest = read_json(folder / MANIFEST, "origin", "checksums")
        for key, value in self.origin.items():
            if manifest["origin"].get(key) != value:
                what = "the base's files have changed since" if key == "files" else f"made with another {key}"
                raise DamagedError(what)
        pieces = read_headers([folder / WEIGHTS])
        checksums = {str(name): [int(sum_) for sum_ in sums] for name, sums in manifest["checksums"].items()}
        if {piece.name: -(-piece.size // CHUNK) for piece in pieces} != {n: len(sums) for n, sums in checksums.items()}:
            raise DamagedError("manifest and weights do not belong together")
        return CachedWeights(folder, pieces, checksums)

    def write(self, base: Any) -> None:
        """Write a quantized model to the first folder that is writable; if none is, give a notice."""
        tied = getattr(base, "all_tied_weights_keys", None) or {}
        tensors = {name: tensor.detach() for name, tensor in base.state_dict().items() if name not in tied}
        needed = sum(tensor.nbytes for tensor in tensors.values())
        if (why := self.write_tensors(tensors.items, len(tensors), needed)) is not None:
            notify(f"the 4-bit weights could not be cached ({why})", where="quantization.cache")

    def write_tensors(
        self, tensors: Callable[[], Iterable[tuple[str, torch.Tensor]]], count: int, needed: int
    ) -> str | None:
        """Write tensors to the first folder that is writable; return the reasons if none is, else None.

        Args:
            tensors: function that returns names and tensors of the state dict; they are written one by one.
            count: number of tensors at most.
            needed: bytes of them all.
        """
        reasons = []
        for folder in self.folders:
            started = time.perf_counter()
            try:
                clear_dead(folder)
                _require_space(folder, needed)
                with whole_folder(folder) as unfinished:
                    checksums = _write(tensors(), count, unfinished / WEIGHTS)
                    write_json(unfinished / MANIFEST, {"origin": self.origin, "checksums": checksums})
            except OSError as error:
                reasons.append(f"{folder}: {error.strerror or error}")
            else:
                seconds = time.perf_counter() - started
                size = f"{needed / 1e9:.1f} GB, {seconds:.0f} s"
                notify(f"cached the 4-bit weights in {folder} ({size})", "info", str(folder))
                return None
        return "; ".join(reasons)


def notify_unusable(folder: Path, reason: str) -> None:
    """Give notice that a copy is not used, with the reason."""
    notify(f"the 4-bit weights cached in {folder} are not used: {reason}; quantizing again", where=str(folder))


def _print(file: Path) -> dict[str, Any]:
    """Identify a file by stat and samples; a hub file also by the name of its blob, its content's hash."""
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


def _write(tensors: Iterable[tuple[str, torch.Tensor]], count: int, file: Path) -> dict[str, list[int]]:
    """Write a safetensors file, a chunk at a time; return each tensor's checksums.

    The header comes first in the file but is known last; spaces, which the format allows, fill what it does not need.
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sums, end, length = {}, 0, ENTRY_BYTES * (count + 1)
    with file.open("wb") as handle:
        handle.seek(8 + length)
        for name, tensor in tensors:
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            sums[name] = _write_tensor(tensor, handle)
        text = json.dumps(header).encode()
        assert len(text) <= length, "more tensors than were announced, or longer names"
        handle.seek(0)
        handle.write(length.to_bytes(8, "little") + text.ljust(length))
    return sums


def _write_tensor(tensor: torch.Tensor, handle: BinaryIO) -> list[int]:
    bytes_ = tensor.contiguous().reshape(-1).view(torch.uint8)
    sums = []
    for start in range(0, len(bytes_), CHUNK):
        array: Any = bytes_[start : start + CHUNK].cpu().numpy()
        view = memoryview(array)
        sums.append(zlib.crc32(view))
        handle.write(view)
    return sums
