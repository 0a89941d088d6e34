"""What `model.base` names. The answer is a folder that Transformers can load, or a hub id.

Order: a built-in name, a path that exists, a hub id of the form owner/name. Built-in models and .gguf files are
converted once to a folder in the user's cache.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from veneer.config import Model, UserError
from veneer.model.builtin import BUILTIN, builtin_folder
from veneer.model.gguf import converted_folder

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Source:
    """Where a base model's files are.

    Attributes:
        kind: builtin, folder, gguf or hub.
        location: A folder, or a hub id; what `from_pretrained` takes.
        name: What the user wrote.
        revision: Of a hub model.
    """

    kind: str
    location: str
    name: str
    revision: str | None = None

    @property
    def reference(self) -> str:
        """The name by which PEFT and Transformers find the weights from any folder: an absolute path, or a hub id."""
        return self.location if self.kind == "hub" else str(Path(self.location).absolute())


def locate(model: Model) -> Source:
    """Resolve `model.base`; fetches and converts a built-in model or a .gguf file on first use.

    Raises:
        UserError: Nothing of that name exists, or the folder holds no model.
    """
    kind, place = find(model)
    if kind == "builtin":
        place = str(builtin_folder(place))
    elif kind == "gguf":
        place = str(converted_folder(Path(place)))
    return Source(kind, place, model.base, model.revision)


def find(model: Model) -> tuple[str, str]:
    """What `model.base` names, with nothing fetched or converted: its kind, and its name, path or hub id.

    Raises:
        UserError: Nothing of that name exists, or the folder holds no model.
    """
    kind, place = _find(model.base)
    if model.revision and kind != "hub":
        raise UserError(
            f"model.revision = {model.revision}: only a hub model has revisions, {model.base} is a {kind} model",
            "leave model.revision out",
        )
    return kind, place


def _find(base: str) -> tuple[str, str]:
    path = Path(base).expanduser()
    if base.lower() in BUILTIN:
        return "builtin", base.lower()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"model.base = {base}: a file, but not a .gguf file",
                "name a folder, a .gguf file or a hub id",
            )
        return "gguf", str(path)
    if path.is_dir():
        _require_model(path, base)
        return "folder", str(path)
    looks_like_path = base.startswith((".", "/", "~")) or base.lower().endswith(".gguf") or base.count("/") > 1
    if looks_like_path or not _HUB_ID.match(base):
        raise UserError(
            f"model.base = {base}: no such folder or file, and not a hub id of the form owner/name",
            f"name an existing folder, a .gguf file, a hub id, or the built-in {', '.join(BUILTIN)}",
        )
    return "hub", base


def _require_model(path: Path, base: str) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise UserError(f"model.base = {base}: holds an adapter, not a base model", "name the model it was trained on")
    held = sorted(entry.name for entry in path.iterdir())
    listing = ", ".join(held[:6]) + (", ..." if len(held) > 6 else "") if held else "nothing"
    raise UserError(
        f"model.base = {base}: the folder has no config.json (it holds {listing})",
        "name the folder that save_pretrained wrote",
    )
