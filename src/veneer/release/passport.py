"""passport.json of an adapter: what it belongs to, and the refusal to load it on anything else.

An adapter is a difference; on another base it is noise that still answers fluently. The passport therefore holds
fingerprints of what the adapter was trained with: the base's weights and configuration, the tokenizer, the chat
template, the adapter's own file. It ships, so it names files and folders by their names alone, never by a path.
Fingerprints are compared whenever a run's adapter is loaded, merged or exported, and a difference is refused by name.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config import Quantization, UserError
from veneer.config.files import read_json, reading
from veneer.config.folder import write_json
from veneer.config.notify import notify
from veneer.evaluation.generation import stop_ids_of
from veneer.model import (
    BaseSource,
    compute_dtype,
    config_sha256,
    fingerprint,
    gguf_origin,
    local_folder,
    stored_quantization,
)
from veneer.release.redact import public_settings
from veneer.training.job import TrainingJob, environment

FILE = "passport.json"


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was in training."""

    what: str
    was: str
    found: str

    def __str__(self) -> str:
        return f"{self.what}: trained with {self.was}, found {self.found}"


def write_passport(job: TrainingJob, folder: Path, training: dict[str, Any]) -> None:
    """Write passport.json into an adapter's folder; the folder holds everything else already."""
    run, ledger = job.run, job.data.ledger
    settings = public_settings(run.model_dump(mode="json"))
    origin, stored = gguf_origin(run.model), stored_quantization(job.source)
    passport = {
        "base": {
            "name": base_name(job.source),
            "kind": job.source.kind,
            "gguf": origin.as_dict() if origin is not None else None,
            "revision": revision(job.source),
            "architecture": type(job.model.get_base_model()).__name__,
            "weights_sampled_sha256": fingerprint(job.source),
            "config_sha256": config_sha256(job.source),
            "stored_in_4_bits": stored.model_dump(include={"quant_type", "double_quant"}) if stored else None,
        },
        "quantization": run.quantization.model_dump() if run.quantization else None,
        "dtype": str(compute_dtype(run.model, job.machine)).removeprefix("torch."),
        "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
        "chat_template_sha256": _template_sha256(folder),
        "adapter_sha256": file_sha256(folder / "adapter_model.safetensors"),
        "adapter_config_sha256": _config_sha256(folder),
        "stop_token_ids": sorted(job.renderer.stop_ids),
        "generation": {
            "do_sample": False,
            "max_new_tokens": run.evaluate.max_new_tokens,
            "eos_token_id": stop_ids_of(job.model, job.renderer),
        },
        "data": {"rows": ledger.rows, "tokens": ledger.tokens, "sha256": ledger.sha256},
        "run_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "training": training,
        "settings": settings,
        "environment": environment(),
    }
    write_json(folder / FILE, passport)


def read_passport(folder: Path) -> dict[str, Any] | None:
    """The passport in an adapter's folder; None where it has none (made by another tool).

    Raises:
        UserError: It cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    fix = "restore it, or delete it to go on without its checks"
    passport = read_json(path, fix=fix)
    if not isinstance(passport.get("base") or {}, dict):
        raise UserError(f"{path}: damaged: `base` is no object", fix)
    return passport


def require_match(folder: Path, source: BaseSource | None, force: bool = False) -> None:
    """Compare an adapter's passport with the base it is to be put on and with its own files.

    Args:
        folder: The adapter's.
        source: The base; None: it is not compared.
        force: Say what differs and go on.

    Raises:
        UserError: Something differs.
    """
    with reading(folder / FILE, "restore it, or delete it to go on without its checks"):
        differences = find_differences(folder, source)
    text = "\n  ".join(map(str, differences))
    if differences and source and trained_in_4_bits(folder) and not stored_quantization(source):
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


def trained_in_4_bits(folder: Path) -> Quantization | None:
    """How the files of the base of the training were quantized to 4 bits, as the passport says; None: they were not."""
    kept = ((read_passport(folder) or {}).get("base") or {}).get("stored_in_4_bits")
    return Quantization(**kept) if isinstance(kept, dict) else None


def find_differences(folder: Path, source: BaseSource | None) -> list[Difference]:
    """What is not as the passport says; nothing where there is no passport."""
    passport = read_passport(folder)
    if passport is None:
        return []
    base = passport.get("base") or {}
    found = []

    def compare(what: str, was: str | None, now: str | None, was_name: str = "", now_name: str = "") -> None:
        if was is not None and now is not None and was != now:
            found.append(Difference(what, f"{was_name}{was[:12]}", f"{now_name}{now[:12]}"))

    if source is not None:
        compare(
            "base weights",
            base.get("weights_sampled_sha256"),
            fingerprint(source),
            f"{base.get('name')} ",
            f"{source.name} ",
        )
        compare("the base's config.json", base.get("config_sha256"), config_sha256(source))
    compare("tokenizer", passport.get("tokenizer_sha256"), file_sha256(folder / "tokenizer.json"))
    compare("chat template", passport.get("chat_template_sha256"), _template_sha256(folder))
    compare("adapter weights", passport.get("adapter_sha256"), file_sha256(folder / "adapter_model.safetensors"))
    compare("adapter_config.json", passport.get("adapter_config_sha256"), _config_sha256(folder))
    return found


def base_name(source: BaseSource) -> str:
    """What a base is called in files that ship: a built-in name, a hub id, or the name of its folder or file alone."""
    if source.kind in ("builtin", "hub"):
        return source.name
    return Path(source.name).expanduser().absolute().name


def revision(source: BaseSource) -> str | None:
    """The commit of a hub model that was loaded; None of others."""
    folder = local_folder(source) if source.kind == "hub" else None
    return folder.name if folder is not None else source.revision


def _config_sha256(folder: Path) -> str | None:
    """Of adapter_config.json, whose alpha and ranks are as much of the adapter as its matrices; its base may move."""
    try:
        config = read_json(folder / "adapter_config.json")
        kept = {key: value for key, value in config.items() if key not in ("base_model_name_or_path", "revision")}
    except (OSError, ValueError, AttributeError):
        return None
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _template_sha256(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
