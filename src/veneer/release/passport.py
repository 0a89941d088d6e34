"""Writes passport.json of an adapter when its training ends; model/passport.py reads it and compares.

It ships, so it names files and folders by their names alone, never by a path.
"""

import hashlib
import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from veneer.config.files import file_sha256
from veneer.config.folder import write_json
from veneer.evaluation.generation import stop_ids_of
from veneer.machine.environment import environment
from veneer.model.classifier import labels_of
from veneer.model.fingerprint import stored_quantization
from veneer.model.full import is_full
from veneer.model.lineage import gguf_origin
from veneer.model.load import compute_dtype
from veneer.model.locate import BaseSource, local_folder
from veneer.model.passport import FILE, adapter_fingerprints, base_fingerprints, base_name, read_passport
from veneer.model.pooling import find_pooling
from veneer.model.start import starts_with_error
from veneer.release.redact import public_settings
from veneer.training.choose_objective import name_objective
from veneer.training.job import TrainingJob
from veneer.training.resuming import public_lineage


def write_passport(job: TrainingJob, folder: Path, training: dict[str, Any]) -> None:
    """Write passport.json into an adapter's folder; the folder holds everything else already."""
    run, ledger = job.run, job.data.ledger
    settings = public_settings(run.model_dump(mode="json"))
    base = job.model if is_full(job.model) else job.model.get_base_model()
    origin, stored = gguf_origin(run.model), stored_quantization(job.source)
    passport = {
        "base": {
            "name": base_name(job.source),
            "kind": job.source.kind,
            "gguf": origin.as_dict() if origin is not None else None,
            "revision": _revision(job.source),
            "architecture": type(base).__name__,
            **base_fingerprints(job.source),
            "stored_in_4_bits": stored.model_dump(include={"quant_type", "double_quant"}) if stored else None,
        },
        "quantization": run.quantization.model_dump() if run.quantization else None,
        "dtype": str(compute_dtype(run.model, job.machine)).removeprefix("torch."),
        **adapter_fingerprints(folder),
        "corrects_rounding": starts_with_error(run, job.start),
        "added_tokens": _added_tokens(job),
        "preference": _preference(job, settings),
        "stop_token_ids": sorted(job.renderer.stop_ids),
        **(_generation(job) if run.model.task == "causal-lm" else _classifier(job)),
        "data": {"rows": ledger.rows, "tokens": ledger.tokens, "sha256": ledger.sha256},
        "run_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "training": training,
        "lineage": public_lineage(job.folder),
        "settings": settings,
        "environment": environment(),
    }
    write_json(folder / FILE, passport)


def _generation(job: TrainingJob) -> dict[str, Any]:
    """Return how answers were generated."""
    most = job.run.evaluate.max_new_tokens
    stops = stop_ids_of(job.model, job.renderer)
    return {"generation": {"do_sample": False, "max_new_tokens": most, "eos_token_id": stops}}


def _classifier(job: TrainingJob) -> dict[str, Any]:
    """Return what a classifier's base is to be loaded with, so that its head has the meaning that it was given."""
    return {
        "classifier": {
            "labels": list(labels_of(job.renderer)),
            "head": sorted(job.model.peft_config["default"].modules_to_save or ()),
            "pad_token_id": job.tokenizer.pad_token_id,
            **({"pooling": find_pooling(job.run.model)} if job.run.model.task == "embedding" else {}),
        }
    }


def _added_tokens(job: TrainingJob) -> dict[str, Any] | None:
    """Return the ids of the tokens that training added, and the rows of the base's embeddings with them; None: none."""
    added = job.run.data.add_special_tokens
    if added is None:
        return None
    ids = job.tokenizer.convert_tokens_to_ids(list(added))
    rows = len(job.model.get_base_model().get_input_embeddings().weight)
    return {"ids": dict(zip(added, ids, strict=True)), "rows": rows}


def _preference(job: TrainingJob, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the objective of a run that prefers answers, with its settings and its reference; None for other runs.

    The reference is the adapter that training started from: its name, its hashes and those in its passport.
    """
    objective, run = job.objective, job.run
    if run.model.task != "causal-lm" or (objective.documents_per_row == 1 and not objective.needs_reference):
        return None
    reference: dict[str, Any] | None = None
    if objective.needs_reference:
        reference = {"computed": run.train.reference, "adapter": None}
        if job.start is not None:
            own = read_passport(job.start) or {}
            reference["adapter"] = {
                "name": settings["model"]["adapter"],
                "adapter_sha256": file_sha256(job.start / "adapter_model.safetensors"),
                "passport_sha256": file_sha256(job.start / FILE),
                "run_sha256": own.get("run_sha256"),
            }
    return {
        "objective": name_objective(run, job.data),
        "settings": asdict(objective) if is_dataclass(objective) else {},
        "reference": reference,
    }


def _revision(source: BaseSource) -> str | None:
    """Return the commit of a hub model that was loaded; None for others."""
    folder = local_folder(source) if source.kind == "hub" else None
    return folder.name if folder is not None else source.revision
