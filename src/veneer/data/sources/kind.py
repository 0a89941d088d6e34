"""Tells what a file is by its content: magic bytes first, then the first character of its text.

Its suffix decides only between kinds of text that look alike (CSV, TSV, prose). So a renamed or a compressed file reads
as it did before, and what cannot be read as rows (UTF-16, an archive, a pretty-printed object) is refused before any
row is read. Only the first HEAD bytes of a file are looked at.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

from veneer.config import UserError

HEAD = 1 << 16  # bytes of a file, after decompression, that tell what it is
JSON = "json"  # lines or array: the first character tells
SUFFIXES = {".json": JSON, ".jsonl": JSON, ".ndjson": JSON, ".csv": "csv", ".tsv": "tsv"}
SUFFIXES |= {".txt": "text", ".text": "text", ".md": "text"}
SUFFIXES |= {".conll": "conll", ".iob": "conll", ".iob2": "conll", ".bio": "conll"}
SUFFIXES |= {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
PACKED = (".gz", ".zst", ".zstd")
BOM = b"\xef\xbb\xbf"
BLANK_HEAD = 64 << 20  # bytes of white space that a file may begin with
UTF_8 = "save the file as UTF-8"
UNPACK = "unpack it and name what is inside"
REFUSED = (  # (how the file begins, what that is, what to do)
    (rb"\xff\xfe|\xfe\xff|\x00\x00\xfe\xff", "text in UTF-16 or UTF-32", UTF_8),
    (rb"PK\x03\x04", "a zip archive or an office document", UNPACK),
    (rb"BZh\d1AY&SY", "a bzip2 archive", UNPACK),
    (rb"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (rb"(?s).{257}ustar", "a tar archive", UNPACK),
    (rb"%PDF-", "a PDF document", "save its text as .txt"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the data itself", "fetch the data with `git lfs pull`"),
)


def open_plain(location: str, compression: str | None) -> BinaryIO:
    """The bytes of a file, decompressed as they are read. Reads may come back short."""
    if compression is None:
        return io.FileIO(location)
    import pyarrow as pa

    stream: BinaryIO = pa.input_stream(location, compression=compression)
    return stream


def chunks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The bytes of a stream, some at a time, without a byte order mark."""
    first = b""
    while len(first) < len(BOM) and (more := stream.read(size)):
        first += more
    yield first.removeprefix(BOM)
    while chunk := stream.read(size):
        yield chunk


def suffix_of(path: PurePath) -> str:
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return PurePath(name).suffix


def head_of(stream: BinaryIO) -> bytes:
    """The first HEAD bytes, from the first that is not blank."""
    head, read = b"", 0
    for chunk in chunks(stream, HEAD):
        head, read = (head + chunk).lstrip(), read + len(chunk)
        if len(head) >= HEAD or (not head and read > BLANK_HEAD):
            break
    return head


def kind_of(head: bytes, path: Path, compression: str | None, setting: str) -> str:
    what, suffix = f"{setting} = {path}", suffix_of(path)
    if not head:
        raise UserError(f"{what}: the file holds no rows", f"name a file with rows in {setting}")
    for begins, is_a, fix in REFUSED:
        if re.match(begins, head):
            raise UserError(f"{what}: is {is_a}", f"{fix}, then name that in {setting}")
    for magic, kind in ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow")):
        if head.startswith(magic):
            if compression:
                raise UserError(
                    f"{what}: is a {kind} file within {compression}", f"unpack it, then name that in {setting}"
                )
            return kind
    kind = _text_kind(head, SUFFIXES.get(suffix, ""), suffix)
    is_binary = b"\0" in head and suffix not in SUFFIXES and not kind.startswith(JSON)
    if is_binary or kind in ("parquet", "arrow"):
        raise UserError(f"{what}: its content is no {suffix or 'text'} data", f"name a data file in {setting}")
    if kind == "json lines" and _is_pretty_printed(head):
        raise UserError(
            f"{what}: one JSON object over several lines",
            f"write an array of objects, or one object a line, into the file that {setting} names",
        )
    return kind


def _text_kind(head: bytes, kind: str, suffix: str) -> str:
    """The kind of a text, of which the suffix says `kind` (or nothing)."""
    line, newline, _ = head.partition(b"\n")
    if suffix == ".txt" and head[:1] == b"{":
        # A first line beyond HEAD cannot be parsed; prose does not begin like this.
        whole = bool(newline) or len(head) < HEAD
        is_row = _is_object(line) if whole else re.match(rb'\{\s*"', line)
        return "json lines" if is_row else kind
    if kind == JSON or (kind in ("", "parquet", "arrow") and head[:1] in b"{["):
        return "json array" if head[:1] == b"[" else "json lines"
    return kind or ("tsv" if b"\t" in line else "csv" if b"," in line else "text")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _is_pretty_printed(head: bytes) -> bool:
    """Whether the first object goes on beyond the first line (a row that is cut off does not)."""
    line, newline, _ = head.partition(b"\n")
    if not newline or line[:1] != b"{" or _is_object(line):
        return False
    text = head.decode(errors="replace")
    try:
        return json.JSONDecoder().raw_decode(text)[1] > text.index("\n")
    except (ValueError, RecursionError):
        # Too long to be seen whole: a key stands on the next line, or an array opens; a row stands after a cut one.
        return len(head) >= HEAD and bool(re.match(rb'[^\n]*([{,]\s*\n\s*"|\[\s*\n)', head))
