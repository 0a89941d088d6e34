"""Reads and writes safetensors with one tensor in memory at a time.

The `safetensors` package maps whole files into memory, which the kernel counts as resident as they are read; a merge
that must stay small reads and writes the bytes itself. Headers (model/shards.py) are checked in full before anything is
written, so that a cut or damaged file is a clear message and not a wrong model. Pickled weights are never read.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.config import UserError
from veneer.config.files import read_json
from veneer.model import shards
from veneer.model.locate import BaseSource
from veneer.model.shards import ALL_DTYPES, INDEX, WHOLE, DamagedError, UnknownTypeError, find_files

NAMES = {dtype: name for name, dtype in ALL_DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # of a file that is written; what the Hub advises
CHUNK_BYTES = 32 * 2**20
AHEAD_BYTES = 256 * 2**20  # that the kernel reads in advance
FETCH_AGAIN = "fetch the model again, or name another folder"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        start: First byte in the file.
        size: Bytes.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def is_float(self) -> bool:
        return self.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    def read(self) -> torch.Tensor:
        """Read the tensor.

        Raises:
            UserError: The file ends before it does.
        """
        data = torch.empty(self.size, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.start)
            got = file.readinto(data.numpy().data)
            _read_ahead(file.fileno(), self.start + self.size)
        if got != self.size:
            raise UserError(f"{self.file}: ends within the tensor {self.name}", FETCH_AGAIN)
        return data.view(self.dtype).reshape(self.shape)

    def chunks(self) -> Iterator[memoryview]:
        """Yield its bytes a piece at a time, in one buffer that is used again."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.size)))
        left = self.size
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                got = file.readinto(buffer[: min(left, len(buffer))])
                if not got:
                    raise UserError(f"{self.file}: ends within the tensor {self.name}", FETCH_AGAIN)
                _read_ahead(file.fileno(), self.start + self.size - left + got)
                yield buffer[:got]
                left -= got


def _read_ahead(file: int, at: int) -> None:
    """Let the kernel fetch what is read next while this process computes; nothing where the system cannot."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, at, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file, in the order of their bytes.

    Raises:
        UserError: The file is damaged: its header is not one, or its tensors overlap or reach beyond its end.
    """
    try:
        pieces = shards.read_header(path, ALL_DTYPES)
    except DamagedError as error:
        raise UserError(f"{path.parent}/{error}", FETCH_AGAIN) from None
    except UnknownTypeError as error:
        raise UserError(f"{path}: holds numbers of the type {error}, which is not known", FETCH_AGAIN) from None
    pieces.sort(key=lambda piece: piece.offset)
    return {
        name: Stored(name, file, ALL_DTYPES[kind], shape, offset, size)
        for name, file, offset, size, kind, shape in pieces
    }


def weights_of(folder: Path, what: str) -> dict[str, Stored]:
    """Return all tensors of a model's folder, shard after shard.

    Args:
        folder: Model folder as `save_pretrained` writes it.
        what: Name of the folder in messages, as `model.base = NAME`.

    Raises:
        UserError: There are no safetensors, a shard is missing, or a file is damaged.
    """
    try:
        files = find_files(BaseSource("folder", str(folder), what))
    except DamagedError as error:
        raise UserError(f"{what}: {folder}: {error}", FETCH_AGAIN) from None
    if files is None:
        held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        pickled = [name for name in held if name.endswith((".bin", ".pt", ".pth"))]
        raise UserError(
            f"{what}: {folder} holds no {WHOLE}" + (f", but {pickled[0]}, which is a pickle" if pickled else ""),
            "convert it: load it with Transformers and call save_pretrained",
        )
    tensors = {name: stored for file in files for name, stored in read_header(file).items()}
    listed = {} if files == [folder / WHOLE] else read_json(folder / INDEX, "weight_map")["weight_map"]
    if lost := sorted(listed.keys() - tensors.keys()):
        raise UserError(f"{what}: {len(lost)} tensors of the index are in no file: {', '.join(lost[:3])}", FETCH_AGAIN)
    return tensors


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: dtype, shape, and the function that makes it.

    `make` gives the tensor, or pieces of its bytes; it is called when its turn comes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor | Iterator[memoryview]]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path, planned: Sequence[PlannedTensor], metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors into one file, or into shards with an index, making each when its turn comes.

    The folder is expected to be a temporary one that is given its name when all is done.
    """
    shards = _shards(planned, shard_bytes)
    files = [WHOLE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(len(shards))]
    with ThreadPoolExecutor(1) as behind:  # flushes a finished file to the disk while the next is made
        flushed = []
        for name, tensors in zip(files, shards, strict=True):
            _write_file(folder / name, tensors, metadata)
            flushed.append(behind.submit(_flush, folder / name))
        for done in flushed:
            done.result()
    if len(shards) > 1:
        placed = {tensor.name: name for name, tensors in zip(files, shards) for tensor in tensors}
        total = sum(tensor.size for tensor in planned)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def _shards(planned: Sequence[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    """Return the tensors in their order, divided where a file is full."""
    shards: list[list[PlannedTensor]] = [[]]
    held = 0
    for tensor in planned:
        if shards[-1] and held + tensor.size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.size
    return shards


def _write_file(path: Path, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.size]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write_all(file, len(text).to_bytes(8, "little") + text)
        with ThreadPoolExecutor(1) as writer:  # a tensor is written while the next is made
            written = writer.submit(int)
            for tensor in tensors:
                made = tensor.make()
                written.result()
                if isinstance(made, torch.Tensor):
                    assert made.dtype == tensor.dtype
                    assert tuple(made.shape) == tensor.shape
                    written = writer.submit(_write_all, file, bytes_of(made))
                else:
                    for piece in made:
                        _write_all(file, piece)
            written.result()
        assert file.tell() == 8 + len(text) + at


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy where it is contiguous."""
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data


def _write_all(file: Any, data: Any) -> int:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    return 0
