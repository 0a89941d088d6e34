"""Starts training from an adapter that is there (`model.adapter`): checks that it fits the run, and takes its weights.

The adapter of the run is a new one with these weights, so it must be of the same method, rank and modules; nothing is
resized. Its passport is compared with the base of the run, since on another base its weights are noise.
"""

from pathlib import Path
from typing import Any

import torch

from veneer.config import Adapter, Run, UserError, load_run
from veneer.config.files import file_sha256, read_json, reading
from veneer.config.manifest import read_manifest
from veneer.config.names import AdapterFolder, find_adapter, require_adapter
from veneer.config.notify import notify
from veneer.model.adapters import find_method
from veneer.model.adapters.from_base import starts_from_base
from veneer.model.adapters.from_error import starts_from_error
from veneer.model.fingerprint import config_sha256, fingerprint
from veneer.model.locate import BaseSource
from veneer.model.passport import Passport, read_passport, require_match
from veneer.model.quiet import quiet

LOW_RANK = ("galore_adamw", "apollo_adamw")  # optimizers of whole weights
FIX = "restore it, or fetch it again"


def find_start(run: Run, source: BaseSource, template: str | None) -> Path | None:
    """Find the adapter that training starts from, before the base is loaded; None: a new one.

    Warns where it was trained with another chat template, or with the base quantized otherwise.

    Args:
        run: settings.
        source: base of the run.
        template: chat template of the run; None: rows are plain text.

    Raises:
        UserError: there is no such adapter, it is of another base, or of another form than the settings say.
    """
    require_possible(run)
    name, adapter = run.model.adapter, run.adapter
    if adapter is None:
        return None
    setting = f"adapter.init_lora_weights = {adapter.init_lora_weights}"
    if starts_from_base(adapter) and run.train.weight_decay:
        raise UserError(
            f"{setting}: train.weight_decay would shrink the part of the adapter that stays as it began",
            "set train.weight_decay: 0",
        )
    if adapter.init_lora_weights is not True and name is not None:
        raise UserError(f"{setting}: training starts from model.adapter = {name}", "leave one of the two out")
    if name is None:
        return None
    if not find_method(adapter).is_lora:
        raise UserError(
            f"model.adapter = {name}: training goes on from another adapter with only lora and dora, and the run has "
            f"adapter.method = {adapter.method}",
            "leave model.adapter out",
        )
    found = require_adapter(name)
    if found.is_full:
        raise UserError(
            f"model.adapter = {name}: that run trained all weights, so it has no adapter",
            f"name {found.path} in model.base",
        )
    passport = read_passport(found.path)
    if found.run is not None and found.path != found.run.delivered:
        _require_base_of_checkpoint(found.path, name, source)
    elif passport is None:
        _warn_of_another_base(found.path, name, source)
    require_match(found.path, passport, source)
    kind = read_json(found.path / "adapter_config.json", "peft_type", fix=FIX)["peft_type"]
    if kind != "LORA":
        raise UserError(
            f"model.adapter = {name}: training goes on from another adapter with only lora and dora, and this one is "
            f"of PEFT's kind {kind}",
            "merge it (`veneer merge`) and name that folder in model.base, or leave model.adapter out",
        )
    if began_with_error(found) and run.quantization is None:
        raise UserError(
            f"model.adapter = {name}: it began with the error of its base's 4 bits (adapter.init_lora_weights = "
            "loftq), and the run's base has no such error",
            "set `quantization: {bits: 4}`",
        )
    _require_same_form(found.path, name, adapter)
    _warn_of_changes(found.path, passport, run, template)
    return found.path


def _require_same_form(folder: Path, name: str, adapter: Adapter) -> None:
    """Raise UserError where an adapter has another method, rank, scale or pattern than the run's is to have."""
    config = read_json(folder / "adapter_config.json", "r", "lora_alpha", fix=FIX)
    settings = {"r": adapter.r, "lora_alpha": adapter.lora_alpha, "use_rslora": adapter.use_rslora}
    theirs = {name: config.get(name, False) for name in settings}
    began = "dora" if config.get("use_dora") else "lora"
    if adapter.method != began:
        raise UserError(
            f"model.adapter = {name}: it was trained with the method {began}, and the run has adapter.method = "
            f"{adapter.method}",
            f"set adapter.method: {began}",
        )
    if theirs != settings:
        written = ", ".join(f"{name}: {value:g}" if name != "use_rslora" else f"{name}: {str(value).lower()}"
                            for name, value in theirs.items())  # fmt: skip
        differ = ", ".join(
            f"adapter.{name} = {settings[name]:g}" for name in settings if theirs[name] != settings[name]
        )
        raise UserError(
            f"model.adapter = {name}: it was trained with {{{written}}}, and the run has {differ}",
            f"set `adapter: {{{written}}}`",
        )
    for pattern in ("rank_pattern", "alpha_pattern"):
        before, now = config.get(pattern) or {}, getattr(adapter, pattern)
        if before != now:
            raise UserError(
                f"model.adapter = {name}: it was trained with {pattern} = {before}, and the run has {now}",
                f"set adapter.{pattern} to that",
            )


def began_with_error(found: AdapterFolder) -> bool:
    """Return whether an adapter began with the error of its base's 4 bits, by its passport or by its run's settings."""
    if (passport := read_passport(found.path)) is not None:
        return passport.get("corrects_rounding") is True
    if found.run is None:
        return False
    run = load_run(found.run.run)
    return starts_with_error(run, Path(run.model.adapter) if run.model.adapter is not None else None)


def starts_with_error(run: Run, start: Path | None) -> bool:
    """Return whether a run's adapter begins with that error, or goes on from one that did.

    Args:
        run: settings.
        start: folder of the adapter that training starts from; None: a new one.
    """
    if run.adapter is not None and starts_from_error(run.adapter):
        return True
    found = find_adapter(str(start)) if start is not None and start.is_dir() else None
    return found is not None and began_with_error(found)


def require_possible(run: Run, is_4bit: bool = False) -> None:
    """Raise UserError for settings that full fine-tuning cannot take, or that it alone can.

    Args:
        run: settings.
        is_4bit: whether the base's files are in 4 bits.
    """
    train = run.train
    if run.adapter is not None:
        if train.master_weights != "auto":
            raise UserError(
                f"train.master_weights = {train.master_weights}: has no effect beside an adapter, whose matrices are "
                "float32 themselves",
                "leave it out, or set `adapter: none` to train all weights",
            )
        if train.optim in LOW_RANK:
            raise UserError(
                f"train.optim = {train.optim}: it keeps moments of whole weights in few dimensions, and an adapter's "
                "matrices have few already",
                "set train.optim: auto, or `adapter: none` to train all weights",
            )
        return
    if run.quantization is not None or is_4bit:
        what = "quantization" if run.quantization is not None else f"model.base = {run.model.base}"
        raise UserError(
            f"{what}: weights in 4 bits cannot be trained, and `adapter: none` trains all weights",
            "leave the section `quantization` out, and name a base in 16 or 32 bits; or train an adapter",
        )
    if run.model.adapter is not None:
        raise UserError(
            f"model.adapter = {run.model.adapter}: `adapter: none` trains the base's own weights",
            "merge it first (`veneer merge`) and name that folder in model.base, or leave one of the two out",
        )
    if run.model.task != "causal-lm":
        raise UserError(
            f"model.task = {run.model.task}: its head is trained beside an adapter, and `adapter: none` has none",
            "leave `adapter: none` out",
        )
    if run.data.add_special_tokens is not None:
        raise UserError(
            "data.add_special_tokens: `adapter: none` trains the base as it is, with which the result is compared",
            "add the tokens to the base, save it (resize_token_embeddings, save_pretrained) and name that folder",
        )
    if run.model.dtype == "float16":
        raise UserError(
            "model.dtype = float16: small updates of whole weights are lost in it, and large ones overflow",
            "set model.dtype: bfloat16 or float32",
        )
    if train.optim.startswith("paged"):
        raise UserError(
            f"train.optim = {train.optim}: states of whole weights are not paged",
            "set train.optim: adamw_8bit or apollo_adamw, whose states are small",
        )
    if train.reference == "live":
        raise UserError(
            "train.reference = live: it would be a second copy of all weights, as `adapter: none` trains them",
            "set train.reference: cached",
        )


def base_sha256(source: BaseSource) -> dict[str, str | None]:
    """Return what a run's checkpoints keep of its base."""
    return {
        "the base's weights": fingerprint(source) or source.reference,
        "the base's configuration (config.json)": config_sha256(source),
    }


def _require_base_of_checkpoint(folder: Path, name: str, source: BaseSource) -> None:
    """Raise UserError for a checkpoint, which has no passport, of a run on another base."""
    began_with = read_manifest(folder)["began_with"]
    if any(began_with.get(what) != now for what, now in base_sha256(source).items()):
        raise UserError(
            f"model.adapter = {name}: it was trained on another base than {source.name}", "name that in model.base"
        )


def _warn_of_another_base(folder: Path, name: str, source: BaseSource) -> None:
    """Warn where an adapter of another tool, whose base nothing but a name tells, names another one."""
    named = read_json(folder / "adapter_config.json", fix=FIX).get("base_model_name_or_path")
    if named and named != source.reference and Path(named).resolve() != Path(source.reference).resolve():
        notify(
            f"model.adapter = {name}: its adapter_config.json names the base {named}, and this run trains on "
            f"{source.reference}; it has no passport by which these could be compared",
            where="model.adapter",
        )


def start_sha256(start: Path | None) -> dict[str, str | None]:
    """Return what a run's checkpoints keep of the adapter that training starts from."""
    if start is None:
        return {}
    return {"the adapter that training starts from": file_sha256(start / "adapter_model.safetensors")}


def _warn_of_changes(folder: Path, passport: Passport | None, run: Run, template: str | None) -> None:
    file = folder / "chat_template.jinja"
    if file.is_file() and file.read_text(encoding="utf-8") != template:
        notify(
            f"model.adapter = {run.model.adapter}: it was trained with another chat template than this run's; for one "
            "that prints a date, set data.template_date to the day that it was trained on",
            where="data.chat_template",
        )
    now = None if run.quantization is None else run.quantization.model_dump(exclude={"cache"})
    then = (passport or {}).get("quantization")
    if (
        passport is not None
        and (then and {key: then.get(key) for key in ("bits", "quant_type", "double_quant")}) != now
    ):
        notify(
            f"model.adapter = {run.model.adapter}: it was trained with quantization {then}, and this run has {now}: "
            "its base computes slightly other numbers",
            where="quantization",
        )


def take_weights(model: Any, folder: Path, name: str) -> None:
    """Replace the weights of a new adapter by those of a folder, in place.

    Args:
        model: PEFT model.
        folder: folder that `find_start` found.
        name: name that the user wrote.

    Raises:
        UserError: its modules are others, or its file is damaged.
    """
    with quiet():
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

    with reading(folder / "adapter_model.safetensors", FIX):
        weights = load_file(folder / "adapter_model.safetensors")
    with quiet():
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
    differ = sorted(key for key in own.keys() | weights.keys() if _shape(own, key) != _shape(weights, key))
    if differ:
        raise UserError(
            f"model.adapter = {name}: {len(differ)} of its matrices are not those of the run's adapter, first "
            f"{differ[0].removeprefix('base_model.model.')}",
            _fix_of(differ[0]),
        )
    with quiet():
        set_peft_model_state_dict(model, {key: value.float() for key, value in weights.items()})
    if not any(value.any() for key, value in weights.items() if "lora_B" in key or "lora_embedding_B" in key):
        notify(
            f"model.adapter = {name}: it changes nothing of the base (its B matrices are zero)", where="model.adapter"
        )


def _fix_of(key: str) -> str:
    """Return what makes a run's adapter have a tensor, or not have it, by the tensor's name in PEFT's file."""
    if "trainable_tokens" in key:
        return "set adapter.trainable_token_indices and data.add_special_tokens to those that it was trained with"
    if key.endswith("bias"):
        return "set adapter.bias to what it was trained with"
    if "lora_" not in key:
        return "set adapter.modules_to_save to the modules that it was trained on"
    return "set adapter.target_modules to the modules that it was trained on"


def _shape(weights: dict[str, torch.Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(weights[key].shape) if key in weights else None
