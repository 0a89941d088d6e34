"""Resolves `model.base` to a folder that Transformers can load, or to a hub id.

Order: a built-in name, a path that exists, a hub id of the form owner/name (`veneer.config.names`). Built-in models
and .gguf files are converted once to a folder in the user's cache.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config import Model, UserError
from veneer.config.hub import not_here, unreachable
from veneer.config.names import find_model
from veneer.model.builtin import builtin_folder
from veneer.model.gguf import converted_folder


@dataclass(frozen=True)
class BaseSource:
    """The source of a base model's files.

    Attributes:
        kind: builtin, folder, gguf or hub.
        location: folder or hub id, for `from_pretrained`.
        name: name that the user wrote.
        revision: revision of a hub model.
    """

    kind: str
    location: str
    name: str
    revision: str | None = None

    @property
    def only_local(self) -> bool:
        """Whether it is on the hub and the hub is unreachable, so that only its cache can be read."""
        return self.kind == "hub" and unreachable() is not None

    @property
    def reference(self) -> str:
        """The name by which PEFT and Transformers find the weights: an absolute path, or a hub id."""
        return self.location if self.kind == "hub" else str(Path(self.location).absolute())


def locate(model: Model) -> BaseSource:
    """Resolve `model.base`; fetch and convert a built-in model or a .gguf file on first use.

    Raises:
        UserError: nothing of that name exists, or the folder holds no model.
    """
    kind, location = find_model(model)
    if kind == "builtin":
        location = str(builtin_folder(location))
    elif kind == "gguf":
        location = str(converted_folder(Path(location)))
    return BaseSource(kind, location, model.base, model.revision)


def local_folder(source: BaseSource) -> Path | None:
    """Return the folder of a base's files; for a hub model the snapshot in the user's cache, None if there is none."""
    if source.kind != "hub":
        return Path(source.location)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


def fetched_folder(source: BaseSource) -> Path:
    """Return the folder with all of a base's files; those of a hub model are fetched.

    Raises:
        UserError: they cannot be fetched.
    """
    if source.kind != "hub":
        return Path(source.location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*"]
    try:
        given: dict[str, Any] = {"revision": source.revision, "local_files_only": source.only_local}
        return Path(snapshot_download(source.location, allow_patterns=wanted, **given))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        local = local_folder(source)
        if local is not None:
            return local
        if (why := unreachable()) is not None:
            raise not_here(f"model.base = {source.name}", why) from None
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.base = {source.name}: cannot be fetched from the hub: {reason}",
            "check the network and your access (hf auth login), or name a folder with --base",
        ) from None
