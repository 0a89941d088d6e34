"""No code of a model's maker is run: what Transformers would import or fetch beside its own classes is refused by name.

Two doors lead to such code. `auto_map` in config.json or tokenizer_config.json names Python files of the repository;
Transformers would ask on standard input whether to run them, so every call here says no beforehand. An attention
named `owner/kernel` is compiled code that the package `kernels` fetches from a hub, and so is flash attention where
its own package is missing.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.config import UserError
from veneer.config.files import read_json

MOST_PARTS = 10_000  # the largest models have some hundred layers, and as many experts in each
COUNT = re.compile(r"^(n|num)_(\w+_)?(layers?|experts)$|_layers$|\.(block|expert)_count$")
MAKERS_CODE = "trust_remote_code"  # how Transformers calls it in its errors


def read_config(place: str | Path, name: str, revision: str | None = None, only_local: bool = False) -> Any:
    """The configuration of a model, with no code but Transformers' own.

    Args:
        place: A folder or a hub id.
        name: What the user wrote, for messages.
        revision: Of a hub model.
        only_local: Whether a hub is not to be asked.

    Raises:
        UserError: It asks for code of its maker's, or for more layers than a model has.
        OSError, ValueError, KeyError: It cannot be had.
    """
    from transformers import AutoConfig, PreTrainedConfig

    raw, _ = PreTrainedConfig.get_config_dict(str(place), revision=revision, local_files_only=only_local)
    require_counts(raw, name)
    config = AutoConfig.from_pretrained(
        str(place), revision=revision, local_files_only=only_local, trust_remote_code=False
    )
    for part in _parts(config):
        require_attention(getattr(part, "_attn_implementation_internal", None), f"{name}: attn_implementation")
    return config


def require_counts(settings: Any, name: str) -> None:
    """Raises UserError for more layers or experts than any model has: Transformers would build them, for hours.

    Args:
        settings: What a configuration file holds, with whatever is nested in it.
        name: Of the model, for the message.
    """
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        if isinstance(value, int) and value > MOST_PARTS and COUNT.search(str(key)):
            raise UserError(
                f"{name}: {key} = {str(value)[:20]}, and at most {MOST_PARTS:,} are built", "name a whole model"
            )
        require_counts(value, name)


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those within it (of a text model, a vision tower)."""
    yield config
    for key in getattr(config, "sub_configs", {}):
        if (part := getattr(config, key, None)) is not None:
            yield from _parts(part)


def require_attention(implementation: Any, setting: str) -> None:
    """Raises UserError for an attention that would be fetched as code from a hub.

    Args:
        implementation: Its name, or names by part of the model; None: not said.
        setting: Where it is written.
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


def refusal(named: str, place: str | Path, error: Exception) -> UserError | None:
    """What is said of a model that loads only with code of its maker's; None: that is not why `error` came."""
    return code_refused(named, place) if MAKERS_CODE in str(error) else None


def require_own_class(named: str, place: str | Path) -> None:
    """Raises UserError for a folder whose architecture is none of Transformers' own, but code that comes with it."""
    from transformers import CONFIG_MAPPING

    file = Path(place) / "config.json"
    if file.is_file() and read_json(file).get("model_type") not in CONFIG_MAPPING and makers_code(place):
        raise code_refused(named, place)


def code_refused(named: str, place: str | Path) -> UserError:
    """The error of a model that needs code of its maker's, with the names of that code."""
    code = ", ".join(makers_code(place)[:4]) or "auto_map"
    return UserError(
        f"{named}: it needs Python code of its maker's ({code}), which is never run",
        "name a model whose architecture is part of Transformers, or update transformers",
    )


def makers_code(place: str | Path) -> list[str]:
    """Python code that a model's files name in `auto_map`, each with its file; none where there is no folder."""
    files = [Path(place) / name for name in ("config.json", "tokenizer_config.json")]
    return [f"{file.name} names {code}" for file in files if file.is_file() for code in _auto_map(file)]


def _auto_map(file: Path) -> list[str]:
    named = read_json(file).get("auto_map")
    values = named.values() if isinstance(named, dict) else [named]
    return [str(part) for value in values for part in (value if isinstance(value, list) else [value]) if part]
