"""Finds the files, Arrow folders and hub datasets that a data setting names; `kind.py` tells what each file is.

A folder gives the files of known suffixes; files that are not data by their name (README.md) are passed over. Where
files of a folder or of a glob are of several splits by their names (`train-00000-of-00001.parquet`, `test/a.jsonl`),
those of the wanted split are taken, with those that name none, and the others are told of. FIFOs, devices and links to
them are refused.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from veneer.config import UserError
from veneer.config.files import read_json
from veneer.config.paths import require_path
from veneer.data.sources.hub import open_dataset
from veneer.data.sources.kind import PACKED, SUFFIXES, head_of, kind_of, open_plain, suffix_of

NOT_DATA = {"readme.md", "readme.txt", "license.md", "license.txt", "dataset_info.json", "dataset_infos.json"}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # a hub's name never begins with a dot: `../data` is a path
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")


@dataclass(frozen=True)
class DataSource:
    """One file, Arrow folder or hub dataset.

    `name` stands in places (`tickets.jsonl:12`): the file's name, and of two files of one name as much of the path as
    tells them apart. `kind` is json lines, json array, csv, tsv, text, parquet, arrow (file or stream), arrow folder
    (of one split, written by `save_to_disk`) or hub dataset. `location` is a path or a hub id. `beside` tells of files
    of other splits that its folder has too.
    """

    name: str
    kind: str
    location: str
    compression: str | None = None  # None, gzip or zstd
    split: str = "train"
    subset: str | None = None
    beside: str = ""

    def fingerprint(self, setting: str = "data") -> str:
        """A hash that changes when the content does: sha256 of the bytes on disk; of a hub dataset its own fingerprint.

        Raises:
            UserError: The source cannot be read.
        """
        if self.kind == "hub dataset":
            return str(open_dataset(self, setting)._fingerprint)
        digest = hashlib.sha256()
        with as_user_errors(self.location, setting):
            files = [Path(self.location)]
            if self.kind == "arrow folder":
                features = read_json(files[0] / "dataset_info.json").get("features")
                digest.update(json.dumps(features, sort_keys=True).encode())
                files = sorted(path for path in files[0].glob("*.arrow") if path.is_file())
            for path in files:
                with path.open("rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
        return digest.hexdigest()


def find_sources(
    named: str | Sequence[str], setting: str, split: str = "train", subset: str | None = None
) -> list[DataSource]:
    """The sources that a setting names, in its order; those of a folder or a glob by path.

    Args:
        named: file, a glob (`**` too), a folder, a hub id (`org/name`), or several of them. `~` is the home folder.
            A name is a hub id only where nothing on disk bears it and it has no suffix of a data file.
        setting: name of the setting that named them, for messages (`data.train`).
        split: split of a hub dataset or saved DatasetDict. A DatasetDict of a single split gives that one for `train`.
        subset: configuration of a hub dataset. The hub is first asked when rows or the fingerprint are read.

    Raises:
        UserError: A name leads to nothing, to something unreadable, empty or not made of rows, or twice to one file.
    """
    names = [named] if isinstance(named, str) else list(named)
    if not names or not all(name.strip() for name in names):
        raise UserError(f"{setting} names no data", f"name a file, folder, glob or hub dataset in {setting}")
    sources: list[DataSource] = []
    for name in names:
        require_path(name, setting)
        with as_user_errors(name, setting):
            if (paths := _paths(name, setting)) is None:
                sources.append(DataSource(name, "hub dataset", name, None, split, subset))
            wanted, beside = _of_split(Path(os.path.expanduser(name)), paths or [], setting, split)
            for path in wanted:
                source = _arrow_folder(path, setting, split) if path.is_dir() else _file(path, setting)
                sources.append(replace(source, beside=beside))
    seen = set()
    for source in sources:
        key = source.location if source.kind == "hub dataset" else os.path.realpath(source.location)
        if key in seen:
            raise UserError(f"{setting} = {source.location}: is named twice", f"name each file once in {setting}")
        seen.add(key)
    return _with_names(sources)


@contextmanager
def as_user_errors(location: str, setting: str) -> Iterator[None]:
    """Within the block, what the system or a decompressor says against a file becomes a UserError."""
    try:
        yield
    except OSError as error:
        # pyarrow's own findings, a truncated archive for one, are OSErrors without a number.
        why = f"damaged ({error})" if error.errno is None else f"cannot be read ({error.strerror})"
        fix = f"mend {error.filename or location}, or name another file in {setting}"
        raise UserError(f"{setting} = {location}: {why}", fix) from error


def _paths(name: str, setting: str) -> list[Path] | None:
    """The files and Arrow folders of one name; None for a hub dataset."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return [path]
    if path.is_dir():
        found = list(_walk(path, set()))
        if not found:
            known = " ".join(SUFFIXES)
            raise UserError(
                f"{setting} = {name}: the folder holds no data files ({known}; also with {' '.join(PACKED)})",
                f"name a folder with data, or name the files themselves in {setting}",
            )
        return found
    if path.exists():
        raise UserError(f"{setting} = {name}: is neither a file nor a folder", f"name a file or a folder in {setting}")
    if re.search(r"[*?[]", name):
        return _matches(str(path), f"{setting} = {name}", setting)
    if HUB_ID.fullmatch(name) and suffix_of(path) not in SUFFIXES:
        return None
    folder = path.absolute().parent
    looked = f"looked in {folder}" if folder.is_dir() else f"there is no folder {folder}"
    raise UserError(f"{setting} = {name}: no such file ({looked})", f"name an existing file in {setting}")


def _matches(pattern: str, what: str, setting: str) -> list[Path]:
    found = [Path(match) for match in glob.glob(pattern, recursive=True)]
    folders = [path for path in found if _is_saved(path)]
    # The files of an Arrow folder that is itself a match are read as that folder.
    files = [path for path in found if path.is_file() and not any(folder in path.parents for folder in folders)]
    if not files + folders:
        raise UserError(f"{what}: matches no file (looked from {Path.cwd()})", f"correct the pattern in {setting}")
    return sorted({*files, *folders})


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Data files and Arrow folders below a folder; `seen` ends circles of links."""
    if _is_saved(folder):
        yield folder
        return
    seen.add(os.path.realpath(folder))
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if os.path.realpath(path) not in seen:
                yield from _walk(path, seen)
        elif suffix_of(path) in SUFFIXES and path.name.lower() not in NOT_DATA:
            if path.exists() and not path.is_file():
                raise UserError(
                    f"{path}: is neither a file nor a folder, but a pipe, socket or device, or a link to one",
                    "take it out of the folder, or name the files themselves",
                )
            yield path


def _of_split(named: Path, paths: list[Path], setting: str, split: str) -> tuple[list[Path], str]:
    """Those of some files that are of a split by their names or name none, and a sentence on the others.

    Raises:
        UserError: They are of several splits, and none of them is the wanted one or the files are to be held out.
    """
    by_split: dict[str, list[Path]] = {}
    for path in paths if len(paths) > 1 else ():
        inside = path.relative_to(named) if path.is_relative_to(named) else Path(path.name)
        words = [word for part in inside.parts for word in re.split(r"[^a-z]+", part.lower()) if word in SPLITS]
        by_split.setdefault(SPLITS[words[0]] if words else "", []).append(path)
    wanted = SPLITS.get(split, split)
    others = {name: found for name, found in by_split.items() if name and name != wanted}
    if not others or (len(by_split) == 1 and wanted == "train"):
        return paths, ""
    listed = ", ".join(f"{name} ({len(found)}, as {found[0].name})" for name, found in others.items())
    if (wanted not in by_split and "" not in by_split) or not setting.startswith(("data.train", "DATA")):
        raise UserError(
            f"{setting} = {named}: holds files of several splits: {', '.join(filter(None, by_split))}",
            f"name the files of one split in {setting}, as {next(iter(others.values()))[0]}",
        )
    taken = [path for path in paths if not any(path in found for found in others.values())]
    return taken, f"{named}: files of other splits are not trained on: {listed}; data.validation can name them"


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    state, info, splits = (folder / name for name in ("state.json", "dataset_info.json", "dataset_dict.json"))
    return splits.is_file() or (state.is_file() and info.is_file())


def _arrow_folder(folder: Path, setting: str, split: str) -> DataSource:
    listed = folder / "dataset_dict.json"
    if not listed.is_file():
        return DataSource(folder.name, "arrow folder", str(folder), split=split)
    try:
        splits = list(read_json(listed, "splits")["splits"])
    except (UserError, ValueError, TypeError):
        raise UserError(
            f"{setting} = {folder}: {listed.name} is damaged", f"save it again, or name other data in {setting}"
        ) from None
    if split not in splits:
        # Only where no split was asked for: a test set that is not there must not become the training set.
        if len(splits) != 1 or split != "train":
            raise UserError(
                f"{setting} = {folder}: has no split {split}; its splits are {', '.join(splits)}",
                f"name one of its splits beside {setting}, or its folder: {folder / splits[0] if splits else folder}",
            )
        split = splits[0]
    return DataSource(folder.name, "arrow folder", str(folder / split), split=split)


def _file(path: Path, setting: str) -> DataSource:
    with as_user_errors(str(path), setting):
        with path.open("rb") as file:
            magic = file.read(4)
        compression = None
        if magic[:2] == b"\x1f\x8b":
            compression = "gzip"
        elif magic == b"\x28\xb5\x2f\xfd" or re.fullmatch(rb"[\x50-\x5f]\x2a\x4d\x18", magic):  # a skippable frame
            compression = "zstd"
        with open_plain(str(path), compression) as stream:
            head = head_of(stream)
    return DataSource(path.name, kind_of(head, path, compression, setting), str(path), compression)


def _with_names(sources: list[DataSource]) -> list[DataSource]:
    """The sources, with names that no two of them share."""
    depth = [2 if source.kind == "hub dataset" else 1 for source in sources]
    named = [source.name for source in sources]
    while len(set(named)) < len(named):
        shared = [named.count(name) > 1 for name in named]
        depth = [deep + clash for deep, clash in zip(depth, shared)]
        tails = [PurePath(source.location).parts[-deep:] for source, deep in zip(sources, depth)]
        named = [str(PurePath(*tail)) if clash else name for tail, clash, name in zip(tails, shared, named)]
    return [replace(source, name=name) for source, name in zip(sources, named)]
