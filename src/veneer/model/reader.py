"""Reads tensors from files to the device, in several threads and a little ahead of their use.

Threads read pieces of CHUNK bytes into their own pinned memory, from where the GPU copies them; on the CPU they read
directly into the tensor. So the host holds a few chunks and never a model, and the device holds at most READ_AHEAD
bytes that have not been taken yet (or one larger tensor). There are no page faults of memory-mapped files, which make
reading by a single thread slow.

All copies go to the CUDA stream of the thread that made the reader. There they are ordered with the work of this
thread, so that memory which it has just freed can be written at once.
"""

import os
import threading
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from veneer.model.shards import DTYPES, DamagedError, Piece

CHUNK = 4 * 2**20  # fits a processor's cache: twice as fast as 16 MiB
READ_AHEAD = 128 * 2**20
THREADS = 8
RETAINED = 64  # unused tensors before the last one taken that are retained, since the order may vary


class _Tensor:
    """A tensor that is being read: its memory, offsets of chunks not begun, and the number of chunks not done."""

    def __init__(self, index: int, piece: Piece, device: str) -> None:
        self.index, self.piece = index, piece
        self.bytes_ = torch.empty(piece.size, dtype=torch.uint8, device=device)
        self.chunks = deque(range(0, piece.size, CHUNK))
        self.left = len(self.chunks)


class Reader:
    """Reads tensors ahead, expecting them to be taken in the given order. Use it as a context manager.

    Args:
        pieces: tensors and their locations in files.
        device: cpu or cuda.
        checksums: CRC-32 of each chunk of a tensor, by name; None: not checked.

    Attributes:
        bytes_read: bytes read so far.
        most_ahead_bytes: largest memory of tensors that were read and not taken yet.
    """

    def __init__(
        self, pieces: Sequence[Piece], device: str, checksums: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        self.device, self._checksums = device, checksums
        self._pieces = tuple(pieces)
        self._index = {piece.name: index for index, piece in enumerate(self._pieces)}
        self._stream = torch.cuda.current_stream() if device == "cuda" else None
        self._changed = threading.Condition()
        self._ahead: dict[str, _Tensor] = {}
        self._asked: deque[_Tensor] = deque()
        self._next, self._window, self._closed = 0, READ_AHEAD, False
        self.failure: Exception | None = None
        self.bytes_read = self.most_ahead_bytes = 0
        count = min(THREADS, os.cpu_count() or 1)
        self._working = count
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]

    def __enter__(self) -> "Reader":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._ahead.clear()

    def take(self, name: str) -> torch.Tensor:
        """Return a tensor, in the file's dtype and on the device, once it is complete. A name may be taken again.

        Raises:
            DamagedError: its file is truncated, or a checksum differs.
            OSError: its file cannot be read.
        """
        with self._changed:
            tensor = self._ahead.pop(name, None)
            if tensor is None:
                tensor = self._begin(self._index[name])
            if tensor.chunks:
                self._asked.append(tensor)
            self._next = max(self._next, tensor.index + 1)
            self._pass_over(tensor.index)
            self._changed.notify_all()
            while tensor.left and self.failure is None:
                assert self._working, "the threads that read have ended"
                self._changed.wait()
            if self.failure is not None:
                raise self.failure
        return tensor.bytes_.view(DTYPES[tensor.piece.kind]).view(tensor.piece.shape)

    def _begin(self, index: int) -> _Tensor:
        with self._in_order():
            return _Tensor(index, self._pieces[index], self.device)

    def _in_order(self) -> AbstractContextManager[object]:
        """Within the context, copies and allocations use the CUDA stream of the thread that made the reader."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _pass_over(self, index: int) -> None:
        """Drop tensors that were passed over, which would fill the read-ahead memory."""
        for name, tensor in list(self._ahead.items()):
            if tensor.index < index - RETAINED:
                del self._ahead[name]

    def _job(self) -> tuple[_Tensor, int] | None:
        """Return the next chunk to read: of tensors that are waited for, then of those ahead."""
        while self._asked:
            if self._asked[0].chunks:
                return self._asked[0], self._asked[0].chunks.popleft()
            self._asked.popleft()
        for tensor in self._ahead.values():
            if tensor.chunks:
                return tensor, tensor.chunks.popleft()
        while self._next < len(self._pieces):
            held = sum(tensor.piece.size for tensor in self._ahead.values())
            piece = self._pieces[self._next]
            if held and held + piece.size > self._window:
                return None
            try:
                tensor = self._begin(self._next)
            except torch.OutOfMemoryError:
                if not self._window:
                    return None
                self._window = 0  # No memory to read ahead; tensors that are taken are still read.
                continue
            self._next += 1
            self._ahead[piece.name] = tensor
            self.most_ahead_bytes = max(self.most_ahead_bytes, held + piece.size)
            if tensor.chunks:
                return tensor, tensor.chunks.popleft()
        return None

    def _wait_for_job(self) -> tuple[_Tensor, int] | None:
        with self._changed:
            while not self._closed and self.failure is None:
                if (job := self._job()) is not None:
                    return job
                self._changed.wait()
        return None

    def _work(self) -> None:
        handles: dict[Path, IO[bytes]] = {}
        try:
            on_gpu = self._stream is not None
            staging = torch.empty(CHUNK, dtype=torch.uint8, device="cpu", pin_memory=True) if on_gpu else None
            while True:
                job = self._wait_for_job()
                if job is None:
                    return
                tensor, start = job
                piece = tensor.piece
                if piece.file not in handles:
                    handles[piece.file] = piece.file.open("rb", buffering=0)
                self._fill(tensor, start, handles[piece.file], staging)
                with self._changed:
                    tensor.left -= 1
                    self.bytes_read += min(CHUNK, piece.size - start)
                    if not tensor.left:
                        self._changed.notify_all()
        except (OSError, DamagedError, RuntimeError) as error:
            with self._changed:
                self.failure = self.failure or error
                self._changed.notify_all()
        finally:
            for handle in handles.values():
                handle.close()
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    def _fill(self, tensor: _Tensor, start: int, handle: IO[bytes], staging: torch.Tensor | None) -> None:
        piece = tensor.piece
        size = min(CHUNK, piece.size - start)
        target = tensor.bytes_[start : start + size]
        landing = target if staging is None else staging[:size]
        array: Any = landing.numpy()
        view = memoryview(array)
        _read(handle, piece, piece.offset + start, view)
        _require_checksum(piece, start, view, self._checksums)
        if staging is not None:
            with self._in_order():
                target.copy_(landing, non_blocking=True)
                done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call, unused-ignore]
                done.record()
            done.synchronize()


class MappedFiles:
    """Gives tensors as views of memory-mapped files, with the interface of `Reader`: the system reads what is used.

    The system may drop them again at any time. A tensor that its file does not align is copied.

    Args:
        pieces: tensors and their locations in files.
        checksums: argument of `Reader`.
    """

    failure: Exception | None = None
    bytes_read = 0

    def __init__(self, pieces: Sequence[Piece], checksums: Mapping[str, Sequence[int]] | None = None) -> None:
        self._pieces, self._checksums = {piece.name: piece for piece in pieces}, checksums
        self._files = {
            file: torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
            for file in {piece.file for piece in pieces}
        }

    def __enter__(self) -> "MappedFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()  # a file stays mapped as long as a tensor is

    def take(self, name: str) -> torch.Tensor:
        """Return a tensor, in the file's dtype.

        Raises:
            DamagedError: a checksum differs.
        """
        piece = self._pieces[name]
        bytes_ = self._files[piece.file][piece.offset : piece.offset + piece.size]
        array: Any = bytes_.numpy()
        for start in range(0, piece.size, CHUNK):
            _require_checksum(piece, start, memoryview(array)[start : start + CHUNK], self._checksums)
        dtype = DTYPES[piece.kind]
        aligned = bytes_ if piece.offset % dtype.itemsize == 0 else bytes_.clone()
        return aligned.view(dtype).view(piece.shape)


def _require_checksum(
    piece: Piece, start: int, view: memoryview, checksums: Mapping[str, Sequence[int]] | None
) -> None:
    if checksums is not None and zlib.crc32(view) != checksums[piece.name][start // CHUNK]:
        raise DamagedError(f"{piece.file.name} is damaged: the checksum of {piece.name} is another")


def _read(handle: Any, piece: Piece, offset: int, view: memoryview) -> None:
    handle.seek(offset)
    done = 0
    while done < len(view):
        count = handle.readinto(view[done:])
        if not count:
            raise DamagedError(f"{piece.file.name} is cut off within {piece.name}")
        done += count
