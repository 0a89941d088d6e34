"""Uploads an adapter or a merged model to a hub, or lists what would be sent.

`huggingface_hub` does the upload. Data is private unless its owner says otherwise: of files that quote rows (ledger,
certificate, samples) ids, counts and verdicts are sent, and `--with-samples` sends the texts too. No file is sent with
a path of this machine: those are cut to names. What is so changed is made for the parcel; the folder stays as it is.

What is sent is listed first, file by file, with what its owner should know before.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from veneer.config import RunFolder, UserError
from veneer.config.files import own_files, read_optional_json
from veneer.config.names import require_adapter
from veneer.model.passport import read_passport
from veneer.release.publish.card import MARK
from veneer.release.publish.vllm_lint import vllm_lint
from veneer.release.redact import (
    name_of,
    public_certificate,
    public_ledger,
    public_merge,
    public_passport,
    without_paths,
)
from veneer.release.weights import weights_of

SKIPPED = (".", "_")
ROWS = ("samples.jsonl", "pii.jsonl")  # rows word for word
LOOKED_AT = 1 << 20  # bytes of a file in which a path of this machine is looked for
# Settings of other libraries that can hold a path.
PATHS_IN = {
    "adapter_config.json": ("base_model_name_or_path",),
    "config.json": ("_name_or_path",),
    "tokenizer_config.json": ("name_or_path", "tokenizer_file"),
}
Page = Callable[[dict[str, Any]], str]
Content = Path | bytes


@dataclass(frozen=True)
class Parcel:
    """The files that a push sends.

    Attributes:
        folder: Folder of the adapter or the model.
        contents: Each file by its name: where it is, or its bytes where they were made for the parcel.
        warnings: Messages for its owner before it is sent.
    """

    folder: str
    repo: str
    private: bool
    contents: dict[str, Content]
    warnings: tuple[str, ...]

    @property
    def files(self) -> dict[str, int]:
        """Name and bytes of each file."""
        return {name: _size(content) for name, content in self.contents.items()}

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def as_dict(self) -> dict[str, Any]:
        known = {"folder": self.folder, "repo": self.repo, "private": self.private, "files": self.files}
        return known | {"warnings": list(self.warnings), "bytes": self.bytes}


def pack(name: str, repo: str, private: bool, with_samples: bool = False, page: Page | None = None) -> Parcel:
    """Collect what would be sent of a run (its adapter), or of a folder with an adapter or a model.

    Args:
        name: The folder.
        repo: owner/name.
        private: Whether others may not see it.
        with_samples: Send rows word for word: samples, and what ledger and certificate quote.
        page: Function that makes certificate.html of a certificate; None: no page is sent.

    Raises:
        UserError: There is nothing to send, or the name of the repository is none.
    """
    run = RunFolder(Path(name).expanduser())
    is_run = run.run.is_file()
    folder = run.delivered if is_run else run.path
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo, re.ASCII):
        raise UserError(f"--repo {repo}: not of the form owner/name", "for example --repo me/tickets")
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter:
        require_adapter(name)
    else:
        if not folder.is_dir() or not (folder / "config.json").is_file():
            raise UserError(f"{name}: holds neither an adapter nor a model", "name a finished run or a merged model")
        weights_of(folder, name)
    own_files(folder, "**/*")
    contents: dict[str, Content] = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(SKIPPED) for part in path.relative_to(folder).parts)
    }
    left = [file for file in contents if PurePath(file).name in ROWS and not with_samples]
    contents = {file: content for file, content in contents.items() if file not in left}
    if with_samples and is_run and run.samples.is_file():
        contents["samples.jsonl"] = run.samples
    contents = {
        file: made
        for file, content in contents.items()
        if (made := _public(folder, file, content, with_samples, page)) is not None
    }
    return Parcel(str(folder), repo, private, contents, tuple(_warnings(folder, contents, is_adapter, with_samples)))


def send(parcel: Parcel) -> str:
    """Upload the parcel; returns the commit's address.

    Raises:
        OSError: No hub is reached, or it refuses (no token, no right); its own errors are of this kind.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    hub = HfApi()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=it) for name, it in parcel.contents.items()]
    try:
        hub.create_repo(parcel.repo, private=parcel.private, exist_ok=True)
        sent = hub.create_commit(parcel.repo, operations, commit_message="Upload with Veneer")
    except (OfflineModeIsEnabled, RuntimeError, ValueError) as error:
        raise OSError(str(error)) from error
    return str(sent)


def _public(folder: Path, file: str, content: Content, with_rows: bool, page: Page | None) -> Content | None:
    """Return what is sent for a file: the file itself, bytes made for the parcel, or nothing (None)."""
    path = folder / file
    kind = PurePath(file).name
    if kind == "certificate.html":
        source = path.with_name("certificate.json")
        if page is None or not source.is_file():
            return None
        return page(public_certificate(read_optional_json(source), source.read_bytes(), with_rows)).encode()
    if kind == "README.md":
        text = path.read_text(encoding="utf-8", errors="replace")  # cards of earlier versions name the base's folder
        return without_paths(text).encode() if MARK in text and _traces(path) else content
    if kind == "certificate.json":
        return _json(public_certificate(read_optional_json(path), path.read_bytes(), with_rows))
    if kind == "ledger.json":
        return _json(public_ledger(read_optional_json(path), path.read_bytes(), with_rows))
    if kind == "passport.json":
        return _changed(path, public_passport(read_optional_json(path)))
    if kind == "merge.json":
        return _changed(path, public_merge(read_optional_json(path)))
    for named, keys in PATHS_IN.items():
        if kind == named:
            kept = read_optional_json(path)
            return _changed(path, kept | {key: name_of(kept[key]) for key in keys if kept.get(key)})
    return content


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _changed(path: Path, value: dict[str, Any]) -> Content:
    """Return new bytes, or the file itself where nothing in it had to be changed."""
    return path if value == read_optional_json(path) else _json(value)


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _warnings(folder: Path, contents: dict[str, Content], is_adapter: bool, with_samples: bool) -> list[str]:
    found = [f"{file} {what}" for file, content in contents.items() if (what := _traces(content))]
    if with_samples:
        found.append("rows of your data go along word for word (--with-samples)")
    if is_adapter:
        found += [f"vLLM does not take it: {check.detail}" for check in vllm_lint(folder) if not check.passed]
        base = read_optional_json(folder / "adapter_config.json").get("base_model_name_or_path")
        is_builtin = ((read_passport(folder) or {}).get("base") or {}).get("kind") == "builtin"  # any Veneer has it
        if base and Path(base).expanduser().is_absolute() and not is_builtin:
            found.append(
                f"its base is a folder of this machine ({base}), sent as {name_of(base)}: nobody else can load it by "
                "that name"
            )
    if "README.md" not in contents:
        found.append("it has no model card (README.md)")
    return found


def _traces(content: Content) -> str:
    """Find texts in a file that give away this machine; empty: none found."""
    if isinstance(content, bytes):
        data = content
    else:
        with content.open("rb") as file:
            data = file.read(LOOKED_AT)
    home = str(Path.home())
    if len(PurePath(home).parts) > 1 and re.search(re.escape(home.encode()) + rb"(?![\w.-])", data):
        return "names your home folder"
    return ""
