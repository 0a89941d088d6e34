"""Refuses code that comes with a model: what Transformers would import or fetch beside its own classes.

There are two kinds of such code. `auto_map` in config.json or tokenizer_config.json names Python files of the
repository; Transformers would ask on standard input whether to run them, so every call here declines in advance. An
attention named `owner/kernel` is compiled code that the package `kernels` fetches from a hub, and so is flash attention
where its own package is missing.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.config import UserError
from veneer.config.files import read_json
from veneer.model.limits import require_sizes

MAKERS_CODE = "trust_remote_code"  # its name in Transformers' errors


def read_config(location: str | Path, name: str, revision: str | None = None, only_local: bool = False) -> Any:
    """Read the configuration of a model, with Transformers' own code alone.

    Args:
        location: folder or hub id.
        name: name in messages.
        revision: revision of a hub model.
        only_local: whether to read the hub's cache alone.

    Raises:
        UserError: it needs code of its maker's, or has sizes that no model has.
        OSError, ValueError, KeyError: it cannot be read.
    """
    from transformers import AutoConfig

    require_sizes(location, name, revision, only_local)
    config = AutoConfig.from_pretrained(
        str(location), revision=revision, local_files_only=only_local, trust_remote_code=False
    )
    for part in _parts(config):
        require_attention(getattr(part, "_attn_implementation_internal", None), f"{name}: attn_implementation")
    return config


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and its nested ones (of a text model, a vision tower)."""
    yield config
    for key in getattr(config, "sub_configs", {}):
        if (part := getattr(config, key, None)) is not None:
            yield from _parts(part)


def require_attention(implementation: Any, setting: str) -> None:
    """Raise UserError for an attention that would be fetched as code from a hub.

    Args:
        implementation: name, or names by part of the model; None: not set.
        setting: setting that has the name, for messages.
    """
    for named in implementation.values() if isinstance(implementation, dict) else (implementation,):
        if named is not None and "/" in str(named):
            raise UserError(
                f"{setting} = {named}: code from a hub, which is never run", "write sdpa or eager, or leave it out"
            )
        if str(named).startswith("flash_attention") and importlib.util.find_spec("flash_attn") is None:
            raise UserError(
                f"{setting} = {named}: the package flash-attn is not installed",
                "install it, or leave the choice to Transformers (model.attn_implementation: auto)",
            )


def refusal(named: str, location: str | Path, error: Exception) -> UserError | None:
    """Return the error of a model that needs code of its maker's; None: `error` has another cause."""
    return code_refused(named, location) if MAKERS_CODE in str(error) else None


def require_own_class(named: str, location: str | Path) -> None:
    """Raise UserError for a folder whose architecture is code that comes with it and not part of Transformers."""
    from transformers import CONFIG_MAPPING

    file = Path(location) / "config.json"
    if file.is_file() and read_json(file).get("model_type") not in CONFIG_MAPPING and makers_code(location):
        raise code_refused(named, location)


def code_refused(named: str, location: str | Path) -> UserError:
    """Return the error of a model that needs code of its maker's, with the names of that code."""
    code = ", ".join(makers_code(location)[:4]) or "auto_map"
    return UserError(
        f"{named}: it needs Python code of its maker's ({code}), which is never run",
        "name a model whose architecture is part of Transformers, or update transformers",
    )


def makers_code(location: str | Path) -> list[str]:
    """Return Python code that a model's files name in `auto_map`, each with its file; empty without a folder."""
    files = [Path(location) / name for name in ("config.json", "tokenizer_config.json")]
    return [f"{file.name} names {code}" for file in files if file.is_file() for code in _auto_map(file)]


def _auto_map(file: Path) -> list[str]:
    named = read_json(file).get("auto_map")
    values = named.values() if isinstance(named, dict) else [named]
    return [str(part) for value in values for part in (value if isinstance(value, list) else [value]) if part]
