"""Reads and checks passport.json of an adapter: hashes of its base, tokenizer and template.

An adapter is a difference; on another base it is noise, but the model still answers fluently. The passport therefore
holds fingerprints of what the adapter was trained with: the base's weights and configuration, the tokenizer, the chat
template, the adapter's own file. It is published, so it has names of files and folders, but never a path.
Fingerprints are compared whenever a run's adapter is loaded, merged or exported, and a difference is refused by name.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from veneer.config import Quantization, UserError
from veneer.config.files import file_sha256, read_json, reading
from veneer.config.notify import notify
from veneer.model.fingerprint import config_sha256, fingerprint, stored_quantization, trained_sha256
from veneer.model.locate import BaseSource

FILE = "passport.json"
FIX = "restore it, or delete it to go on without its checks"
NAMES = {  # names of fingerprints in messages
    "weights_sampled_sha256": "base weights",
    "config_sha256": "the base's config.json",
    "tokenizer_sha256": "tokenizer",
    "chat_template_sha256": "chat template",
    "adapter_sha256": "adapter weights",
    "adapter_config_sha256": "adapter_config.json",
}
Passport = dict[str, Any]


def read_passport(folder: Path) -> Passport | None:
    """Read the passport in an adapter's folder; None if it has none (made by another tool).

    Raises:
        UserError: it cannot be read.
    """
    passport = read_json(folder / FILE, fix=FIX) if (folder / FILE).is_file() else None
    if passport is not None and not isinstance(passport.get("base") or {}, dict):
        raise UserError(f"{folder / FILE}: damaged: `base` is no object", FIX)
    return passport


def require_match(folder: Path, passport: Passport | None, source: BaseSource | None, force: bool = False) -> None:
    """Compare an adapter's passport with its new base and with its own files.

    Args:
        folder: folder of the adapter.
        passport: passport in it; None: there is none, and nothing is compared.
        source: the base; None: it is not compared.
        force: whether to warn of differences and go on.

    Raises:
        UserError: something differs.
    """
    if passport is None:
        return
    with reading(folder / FILE, FIX):
        differences = find_differences(folder, passport, source)
    text = "\n  ".join(differences)
    if differences and source and trained_in_4_bits(passport) and not stored_quantization(source):
        text += (
            f"\n  the base of the training was stored in 4 bits, which {source.name} is not: with --force it is "
            "quantized to them, which gives the weights of the training only where those were made from it"
        )
    if differences and not force:
        raise UserError(
            f"{folder}: the adapter does not belong to this\n  {text}",
            "name what it was trained with, or use --force to go on all the same",
        )
    if differences:
        notify(f"--force overrides the adapter's passport\n  {text}", where=str(folder))


def trained_in_4_bits(passport: Passport | None) -> Quantization | None:
    """Return how the files of the training's base were quantized to 4 bits, by the passport; None: they were not."""
    stored = ((passport or {}).get("base") or {}).get("stored_in_4_bits")
    return Quantization(**stored) if isinstance(stored, dict) else None


def find_differences(folder: Path, passport: Passport, source: BaseSource | None) -> list[str]:
    """Return the differences from the passport."""
    base, found = passport.get("base") or {}, list[str]()
    if source is not None:
        named = base.get("name")
        for key, now in base_fingerprints(source).items():
            names = (f"{named} ", f"{source.name} ") if key == "weights_sampled_sha256" else ("", "")
            found += _difference(key, base.get(key), now, *names)
    for key, now in adapter_fingerprints(folder).items():
        found += _difference(key, passport.get(key), now)
    return found


def base_fingerprints(source: BaseSource) -> dict[str, str | None]:
    """Return the fingerprints of a base, by the passport's keys; None: the file is not local."""
    return {"weights_sampled_sha256": fingerprint(source), "config_sha256": config_sha256(source)}


def adapter_fingerprints(folder: Path) -> dict[str, str | None]:
    """Return SHA-256 of an adapter's own files, by the passport's keys; None: there is no such file."""
    template = folder / "chat_template.jinja"
    return {
        "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
        "chat_template_sha256": hashlib.sha256(template.read_bytes() if template.is_file() else b"").hexdigest(),
        "adapter_sha256": trained_sha256(folder),
        "adapter_config_sha256": _adapter_config_sha256(folder),
    }


def base_name(source: BaseSource) -> str:
    """Return a base's name for published files: a built-in name, a hub id, or the name of its folder or file."""
    if source.kind in ("builtin", "hub"):
        return source.name
    return Path(source.name).expanduser().absolute().name


def _adapter_config_sha256(folder: Path) -> str | None:
    """Return SHA-256 of adapter_config.json, since alpha and ranks matter too; without its base, which may move."""
    try:
        config = read_json(folder / "adapter_config.json")
        properties = {key: value for key, value in config.items() if key not in ("base_model_name_or_path", "revision")}
    except (OSError, ValueError, AttributeError):
        return None
    return hashlib.sha256(json.dumps(properties, sort_keys=True).encode()).hexdigest()


def _difference(key: str, was: str | None, now: str | None, was_name: str = "", now_name: str = "") -> list[str]:
    """Return the difference of two fingerprints; empty if one of them is not known."""
    if was is None or now is None or was == now:
        return []
    return [f"{NAMES[key]}: trained with {was_name}{was[:12]}, found {now_name}{now[:12]}"]
