"""Keeps tokenized rows on disk: written once, read by position, never held in memory as a whole.

A folder of flat arrays, one file each. `ids.bin` has the tokens of all examples, one behind the other; it is read with
plain reads and not mapped, so that many gigabytes never count as this process's memory, and so is `signatures.bin`, by
which near-duplicates are found. The others, about 40 bytes an example, are loaded: lengths, trained spans, and which
row an example came from. `account.json` has the counts for the ledger, `pii.jsonl` where personal data stood, and
`checksums.json` a checksum of every other file: one flipped token would train another adapter under the same name.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from veneer.config import UserError
from veneer.config.files import file_sha256, read_json
from veneer.config.notify import notify
from veneer.data.batch import Example
from veneer.data.screening.deduplication import BINS
from veneer.data.sources.block import RowBlock
from veneer.data.tokens.tokenize import ROW, SPAN, Tokenized

ACCOUNT = ("fates", "notes", "personal", "lengths", "names", "problems", "stop_ids")
CHECKSUMS = "checksums.json"
LISTED = 100  # problems kept word for word
LOADED: dict[str, Any] = {"lengths": np.uint32, "ends": np.uint32, "span_counts": np.uint32, "rows": ROW, "spans": SPAN}
WRITTEN = ("ids", "signatures", *LOADED)


class Corpus(Sequence[Example]):
    """Examples in a folder that `write` made.

    Attributes:
        lengths, trained, ends: Tokens of each example, those trained, and end-of-turn tokens among these.
        rows: source, number, hash and group of each row; dtype ROW.
        row_of: The row of each example.
        account: Counts for the ledger.
        folder: folder of its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.account = read_json(folder / "account.json", *ACCOUNT, fix="delete the folder")
        self.lengths, self.ends, counts, self.rows, self._spans = (
            np.fromfile(folder / f"{name}.bin", dtype) for name, dtype in LOADED.items()
        )
        self._begin = _sums(self.lengths)
        self._span_begin = _sums(counts)
        self.row_of = np.repeat(np.arange(len(self.rows)), self.rows["examples"])
        sizes = _sums(self._spans["end"] - self._spans["start"])
        self.trained = sizes[self._span_begin[1:]] - sizes[self._span_begin[:-1]]
        self._file = os.open(folder / "ids.bin", os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        length, begin = int(self.lengths[at]), int(self._begin[at])
        ids = np.frombuffer(os.pread(self._file, 4 * length, 4 * begin), dtype=np.uint32)
        spans = self._spans[self._span_begin[at] : self._span_begin[at + 1]].tolist()
        return Example(ids.astype(np.int32), tuple(spans), self.place(int(self.row_of[at])))

    def place(self, row: int) -> str:
        """The place of a row in its file."""
        name, by_line = self.account["names"][str(self.rows["source"][row])]
        number = int(self.rows["number"][row])
        return f"{name}:{number}" if by_line else f"{name}[{number}]"

    def signatures(self, start: int, stop: int) -> Any:
        """Signatures of some rows; uint8, shape (rows, BINS)."""
        with (self.folder / "signatures.bin").open("rb") as file:
            file.seek(start * BINS)
            return np.frombuffer(file.read((stop - start) * BINS), dtype=np.uint8).reshape(-1, BINS)


def write(folder: Path, parts: Iterable[tuple[int, RowBlock, Tokenized]]) -> None:
    """Write tokenized blocks into a folder, as they come."""
    counted: dict[str, Counter[Any]] = {name: Counter() for name in ("fates", "notes", "personal", "lengths")}
    names: dict[int, tuple[str, bool]] = {}
    problems: list[tuple[str, str, str]] = []
    stop_ids: set[int] = set()
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in WRITTEN}
        personal = stack.enter_context((folder / "pii.jsonl").open("w", encoding="utf-8"))
        for source, block, part in parts:
            names[source] = (block.name, block.by_line)
            for name, file in files.items():
                file.write(getattr(part, name).tobytes())
            counted["fates"].update(part.fates)
            counted["notes"].update(part.notes)
            counted["lengths"].update(part.all_lengths.tolist())
            counted["personal"].update(found.kind for found in part.personal)
            problems += [(p.place, p.fate, p.reason) for p in part.problems][: LISTED - len(problems)]
            stop_ids |= part.stop_ids
            for found in part.personal:
                personal.write(json.dumps(asdict(found)) + "\n")
    account = counted | {
        "lengths": sorted(counted["lengths"].items()),
        "names": names,
        "problems": problems,
        "stop_ids": sorted(stop_ids),
    }
    (folder / "account.json").write_text(json.dumps(account), encoding="utf-8")


def seal(folder: Path) -> None:
    """Write the checksums of all files of a corpus, which is complete with that."""
    (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder)), encoding="utf-8")


def is_sound(folder: Path) -> bool:
    """Whether all files of a corpus are as they were sealed; says so where they are not."""
    try:
        sound = read_json(folder / CHECKSUMS) == _checksums(folder)
    except (OSError, UserError):
        sound = False
    if not sound:
        notify(f"{folder}: damaged; the rows are tokenized again", where=str(folder))
    return sound


def _checksums(folder: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) or "" for file in sorted(folder.iterdir()) if file.name != CHECKSUMS}


def _sums(counts: Any) -> Any:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
