"""Loads a base model's tokenizer and weights.

bitsandbytes owns the 4-bit format (blocks of 64, constants quantized again) and works on the CPU too; embeddings
and head stay in 16 bits. Norms stay in the model's own precision: their kernels compute in float32 anyway, and
raising their weights would raise every activation behind them. A loaded model is frozen, in evaluation mode and
without a key-value cache; `attach` puts the adapter on.
"""

import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from veneer.config import Model, Quantization, UserError
from veneer.config.files import own_files, read_json, reading
from veneer.config.hub import not_here, unreachable
from veneer.data.sandbox import shared
from veneer.machine.device import Machine, named_dtype
from veneer.model.dense import keep_dense
from veneer.model.kept import Copy, CopyOnDisk, notify_unusable
from veneer.model.limits import require_sizes
from veneer.model.locate import BaseSource, local_folder
from veneer.model.quiet import quiet
from veneer.model.remote import refusal, require_attention, require_own_class
from veneer.model.stream import Checkpoint, circles_collected, find_checkpoint, note_range, require_finite, stream


class LoadReport(NamedTuple):
    """How a base model was loaded.

    Attributes:
        seconds: In all.
        bytes_read: From files; 0 where Transformers read them.
        way: files, cache (of quantized weights) or transformers (by its own reader).
    """

    seconds: float
    bytes_read: int
    way: str


class _Loaded(NamedTuple):
    """A model as it was loaded; `copy` is where its 4-bit weights are to be kept."""

    base: Any
    missing: list[str]
    bytes_read: int
    way: str
    copy: Copy | None = None


def compute_dtype(model: Model, machine: Machine) -> torch.dtype:
    """The precision that `model.dtype` means on this machine."""
    return named_dtype(model.dtype, machine.dtype)


def load_tokenizer(source: BaseSource) -> Any:
    """The tokenizer of a base model, always a fast one, padding on the left (as generation needs)."""
    shared().start()  # templates will be rendered: it loads Transformers, too, and does so meanwhile
    from transformers import AutoTokenizer

    if source.kind != "hub":
        own_files(Path(source.location), "*.jinja")  # it ships with the adapter, word for word
    with _loading(source, "tokenizer"):
        require_own_class(f"model.base = {source.name}", source.location)
        require_sizes(source.location, f"model.base = {source.name}", source.revision, source.only_local)
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, local_files_only=source.only_local, trust_remote_code=False
        )
        tokenizer("a")  # settings that it cannot work with show here, and not within a row
    if not tokenizer.is_fast:
        raise UserError(
            f"model.base = {source.name}: its tokenizer has no fast version",
            "convert it with Transformers' convert_slow_tokenizer",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # Only generation pads with it; training never looks at ids.
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(source: BaseSource, model: Model, quantization: Quantization | None, machine: Machine) -> Any:
    """The base model on the machine's device, frozen.

    Raises:
        UserError: It cannot be found or loaded, or its files lack weights.
        torch.OutOfMemoryError: It does not fit.
    """
    return load_base(source, model, quantization, machine)[0]


def load_base(
    source: BaseSource, model: Model, quantization: Quantization | None, machine: Machine
) -> tuple[Any, LoadReport]:
    """As `load_model`, with a report of where the weights came from and how long it took."""
    started = time.perf_counter()
    settings = settings_of(model, quantization, machine)
    with _loading(source, "model"):
        folder = local_folder(source)
        if (
            folder is not None and (folder / "generation_config.json").is_file()
        ):  # Transformers passes over a damaged one
            read_json(folder / "generation_config.json", fix="fetch it again, or delete it if it is not needed")
        loaded = _load(source, settings, quantization, machine)
    if loaded.missing:
        raise UserError(
            f"model.base = {source.name}: its files lack {len(loaded.missing)} weights "
            f"({', '.join(loaded.missing[:3])}, ...); they would be random",
            "name a complete model",
        )
    base = loaded.base
    base_stop_ids(getattr(base, "generation_config", None), f"model.base = {source.name}: generation_config.json")
    base.requires_grad_(False)
    keep_4bit_layout(base)
    base.config.use_cache = False
    base.eval()
    if machine.device == "cuda":
        torch.cuda.synchronize()
    report = LoadReport(time.perf_counter() - started, loaded.bytes_read, loaded.way)
    if loaded.copy is not None:
        loaded.copy.write(base)
    if machine.device == "cpu":
        keep_dense(base, machine.free_bytes)
    return base, report


def base_stop_ids(settings: Any, file: str) -> set[int]:
    """The tokens that a base's settings end an answer at (`eos_token_id`: a number, a list of them, or none).

    Args:
        settings: A configuration object, or what a JSON file holds.
        file: Where they stand, for the message.

    Raises:
        UserError: They are no token ids.
    """
    named = settings.get("eos_token_id") if isinstance(settings, dict) else getattr(settings, "eos_token_id", None)
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if wrong := [number for number in ids if type(number) is not int or abs(number) >= 2**31]:
        raise UserError(f"{file}: eos_token_id names {str(wrong[0])[:40]!r}, which is no token id", "fetch it again")
    return set(ids)


def settings_of(model: Model, quantization: Quantization | None, machine: Machine) -> dict[str, Any]:
    """What `from_pretrained` is given, beside where the model is."""
    from transformers import BitsAndBytesConfig

    dtype = compute_dtype(model, machine)
    settings: dict[str, Any] = {"dtype": dtype, "device_map": {"": machine.device}}
    if model.attn_implementation != "auto":
        require_attention(model.attn_implementation, "model.attn_implementation")
        settings["attn_implementation"] = model.attn_implementation
    if quantization is not None:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.quant_type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return settings


def _load(source: BaseSource, settings: dict[str, Any], quantization: Quantization | None, machine: Machine) -> _Loaded:
    checkpoint = find_checkpoint(source, quantization) if machine.device in ("cuda", "cpu") else None
    if checkpoint is None:
        base, missing = load_plainly(source, settings)
        return _Loaded(base, missing, 0, "transformers")
    copy = None
    if quantization is not None and quantization.cache and not checkpoint.is_quantized:
        copy = Copy.of(source, checkpoint.files, quantization, settings["dtype"], machine.device)
        kept = copy.find()
        if kept is not None and (loaded := _load_kept(source, checkpoint, kept, settings, machine)) is not None:
            return loaded
    base, missing, bytes_read = stream(source, checkpoint, settings, machine.device)
    return _Loaded(base, missing, bytes_read, "files", copy)


def _load_kept(
    source: BaseSource, checkpoint: Checkpoint, kept: CopyOnDisk, settings: dict[str, Any], machine: Machine
) -> _Loaded | None:
    """The model from its kept 4-bit weights; None, with a notice, where they turn out to be damaged."""
    try:
        quantized = checkpoint.quantized_as(settings["quantization_config"].to_dict(), kept.pieces)
        base, missing, bytes_read = stream(source, quantized, settings, machine.device, kept.checksums)
        reason = f"it lacks {missing[0]}" if missing else ""
    except torch.OutOfMemoryError:
        raise  # nothing is wrong with the copy
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if reason:
        notify_unusable(kept.folder, reason)
        gc.collect()  # what was loaded of it must not lie beside the next
        return None
    return _Loaded(base, missing, bytes_read, "cache")


def load_plainly(source: BaseSource, settings: dict[str, Any]) -> tuple[Any, list[str]]:
    """The model and the names of weights that its files lack, by Transformers' own reader."""
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": source.location,
        "local_files_only": source.only_local,
    }
    if source.revision:
        where["revision"] = source.revision
    folder = Path(source.location)
    size = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else sys.maxsize  # not known
    with circles_collected(size, settings["device_map"][""]):
        base, report = AutoModelForCausalLM.from_pretrained(
            **where, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **settings
        )
    ranges: dict[str, torch.Tensor] = {}
    for name, parameter in base.named_parameters():
        note_range(ranges, name, parameter.data)
    require_finite(source, ranges)
    return base, sorted(report["missing_keys"])


def keep_4bit_layout(base: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with AVX-512 bf16.

    It would do so at the first forward in evaluation mode, for faster inference: for good, with the blocks'
    constants rounded to bf16, and without a gradient, so that training after an evaluation would learn nothing.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def _loading(source: BaseSource, what: str) -> Iterator[None]:
    """Keep libraries quiet, and turn what they make of a model's files into one message."""
    named = f"model.base = {source.name}: the {what}"
    message, fix = f"{named} cannot be loaded", "name another model.base"
    if source.kind == "hub":
        message = f"{named} cannot be had from the hub"
        fix = "check the name (there is no folder of that name either), the network and your access (hf auth login)"
    with quiet(), reading(message, fix):
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if (refused := refusal(named, source.location, error)) is not None:
                raise refused from None
            if source.kind == "hub" and (why := unreachable()) is not None:
                raise not_here(message, why) from None
            raise
