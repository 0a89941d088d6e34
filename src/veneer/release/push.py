"""Upload of an adapter or a merged model to a hub; and what would be sent, where none is reached.

`huggingface_hub` does the upload. What is sent is told first, file by file, with what in it names this machine: paths
in settings and ledger are often not meant for the world.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.config import RunFolder, UserError
from veneer.release.lint import vllm_lint
from veneer.release.origin import require_adapter
from veneer.release.weights import weights_of

SKIPPED = (".", "_")


@dataclass(frozen=True)
class Parcel:
    """What a push sends.

    Attributes:
        folder: Where it lies.
        files: Name and bytes of each file.
        warnings: What its owner should know before it leaves the house.
    """

    folder: str
    repo: str
    private: bool
    files: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bytes": self.bytes}


def pack(name: str, repo: str, private: bool) -> Parcel:
    """What would be sent of a run (its adapter), or of a folder with an adapter or a model.

    Raises:
        UserError: There is nothing to send, or the name of the repository is none.
    """
    run = RunFolder(Path(name).expanduser())
    folder = run.adapter if run.run.is_file() else run.path
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo, re.ASCII):
        raise UserError(f"--repo {repo}: not of the form owner/name", "for example --repo me/tickets")
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter:
        require_adapter(folder, name)
    else:
        if not folder.is_dir() or not (folder / "config.json").is_file():
            raise UserError(f"{name}: holds neither an adapter nor a model", "name a finished run or a merged model")
        weights_of(folder, name)
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(SKIPPED)
    }
    return Parcel(str(folder), repo, private, files, tuple(_warnings(folder, files, is_adapter)))


def send(parcel: Parcel) -> str:
    """Upload; returns the commit's address.

    Raises:
        OSError: No hub is reached, or it refuses (no token, no right); its own errors are of this kind.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    hub = HfApi()
    try:
        hub.create_repo(parcel.repo, private=parcel.private, exist_ok=True)
        sent = hub.upload_folder(repo_id=parcel.repo, folder_path=parcel.folder, allow_patterns=list(parcel.files))
    except (OfflineModeIsEnabled, RuntimeError, ValueError) as error:
        raise OSError(str(error)) from error
    return str(sent)


def _warnings(folder: Path, files: dict[str, int], is_adapter: bool) -> list[str]:
    found = []
    home = str(Path.home())
    for name in ("passport.json", "ledger.json", "adapter_config.json", "merge.json", "README.md"):
        text = (folder / name).read_text(encoding="utf-8") if name in files else ""
        if f"{home}/" in text or '"/' in text:
            found.append(f"{name} names paths of this machine")
    if is_adapter:
        found += [f"vLLM does not take it: {check.message}" for check in vllm_lint(folder) if not check.passed]
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base and Path(base).expanduser().is_absolute():
            found.append(f"its base is a folder of this machine ({base}): nobody else can load it by that name")
    if "README.md" not in files:
        found.append("it has no model card (README.md)")
    return found
