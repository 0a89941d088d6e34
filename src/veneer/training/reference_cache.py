"""Keeps the reference's log-probabilities in the user's cache, beside the tokens, for a second or a resumed run.

An entry's name is a hash of all that its numbers depend on, and its manifest states these facts and the checksum of its
file. An entry that is damaged, or that states other facts, is computed again. A base whose weights cannot be identified
has no entry.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file

import veneer
from veneer.config import Run, UserError
from veneer.config.cache import cache_folder, cached
from veneer.config.files import file_sha256, read_json
from veneer.config.folder import write_json
from veneer.config.notify import notify
from veneer.config.versions import version_of
from veneer.data.batch import Batches
from veneer.data.pipeline import Prepared
from veneer.engine.interface import Engine
from veneer.machine.device import Machine
from veneer.machine.ranks import ALONE, Ranks
from veneer.model.fingerprint import config_sha256, fingerprint
from veneer.model.full import is_full
from veneer.model.load import compute_dtype
from veneer.model.locate import BaseSource
from veneer.training.reference_logprobs import NAME

LAYOUT = 1  # of an entry and of the numbers in it; another number makes them anew
FILE, MANIFEST = "sums.safetensors", "manifest.json"
Facts = dict[str, Any]


def facts_of(
    run: Run,
    machine: Machine,
    source: BaseSource,
    model: Any,
    engine: Engine,
    data: Prepared,
    batches: Batches,
    steps: int,
) -> Facts | None:
    """Return all that the reference's log-probabilities depend on; None: the base's weights cannot be identified.

    Args:
        run: settings.
        machine: machine of the run.
        source: base of the run.
        model: PEFT model, whose adapter is what training starts from.
        engine: engine that computes them.
        data: data of the run.
        batches: steps over the training rows, which say what is computed together.
        steps: number of steps of the run.
    """
    weights = fingerprint(source)
    if weights is None:
        return None
    read = [batches.members_of_step(step) for step in range(min(steps, batches.steps_per_epoch))]
    quantization = run.quantization.model_dump(exclude={"cache"}) if run.quantization else None
    names = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "layout": LAYOUT,
        "base": [weights, config_sha256(source)],
        "quantization": quantization,
        "adapter": None if is_full(model) else _adapter_sha256(model),
        "adapter_settings": run.adapter and run.adapter.model_dump(mode="json", exclude={"lora_dropout"}),
        "tokens": data.ledger.sha256,
        "micro_batches": hashlib.sha256(json.dumps(read).encode()).hexdigest(),
        "engine": [engine.name, engine.shares_prompts],
        "attention": run.model.attn_implementation,
        "dtype": str(compute_dtype(run.model, machine)),
        "device": [machine.device, machine.name],
        "libraries": [veneer.__version__, *(version_of(name) for name in names)],
    }


def _adapter_sha256(model: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_or_measure(facts: Facts | None, data: Prepared, measure: Callable[[], None], ranks: Ranks = ALONE) -> None:
    """Give all examples that a run reads their reference: that of the cache, or what is measured and kept there.

    Args:
        facts: all that the numbers depend on; None: nothing is kept.
        data: data of the run, whose examples are given it.
        measure: function that gives it to them; all ranks call it together.
        ranks: this process among those of the run.
    """
    if facts is None:
        measure()
        return
    parts = {"train": data.train, "validation": data.validation}
    lengths = {name: len(part) for name, part in parts.items()}
    was_measured = False

    def make(folder: Path) -> None:
        nonlocal was_measured
        if not was_measured:
            measure()
        was_measured = True
        save_file({name: part.values[NAME] for name, part in parts.items()}, folder / FILE)
        write_json(folder / MANIFEST, {"facts": facts, "lengths": lengths, "sha256": file_sha256(folder / FILE)})

    def is_sound(folder: Path) -> bool:
        try:
            manifest = read_json(folder / MANIFEST)
            expected = {"facts": facts, "lengths": lengths, "sha256": file_sha256(folder / FILE)}
            sound = manifest == expected
        except (OSError, UserError):
            sound = False
        if not sound:
            notify(f"{folder}: damaged, or of another run; the reference is computed again", where=str(folder))
        return sound

    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    entry = f"reference/{key}"
    if ranks.size > 1:
        kept = cache_folder() / entry
        if not ranks.first(lambda: kept.is_dir() and is_sound(kept)):
            measure()
            was_measured = True
            if not ranks.is_first:
                return
    folder = cached(entry, make, is_sound)
    if was_measured:
        return
    for name, sums in load_file(folder / FILE).items():
        parts[name].values[NAME] = sums
    notify(f"the reference's log-probabilities are those of an earlier run, kept in {folder}", "info", str(folder))
