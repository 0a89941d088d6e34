"""Loads a base model's tokenizer and weights.

bitsandbytes owns the 4-bit format (blocks of 64, constants quantized again) and works on the CPU too; embeddings and
head stay in 16 bits. Norms keep the model's own dtype: their kernels compute in float32 anyway, and float32 weights
would make every activation after them float32. A loaded model is frozen, in evaluation mode and without a key-value
cache; `attach` adds the adapter.
"""

import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from veneer.config import Data, Model, Quantization, UserError
from veneer.config.files import own_files, read_json, reading
from veneer.config.hub import not_here, unreachable
from veneer.data.sandbox import shared
from veneer.machine.device import Machine, named_dtype
from veneer.model.dense import add_dense_copies
from veneer.model.handles import MOST_PARTS, Quantizing, note_range
from veneer.model.host import fits_host, host_bytes, quantized_tensors, quantizing_of, short_of_memory
from veneer.model.limits import require_sizes
from veneer.model.locate import BaseSource, local_folder
from veneer.model.new_tokens import add_tokens
from veneer.model.quantized_cache import CachedWeights, QuantizedCache, notify_unusable
from veneer.model.quiet import quiet
from veneer.model.remote import refusal, require_attention, require_own_class
from veneer.model.stream import Checkpoint, collect_cycles, find_checkpoint, require_finite, stream


class LoadReport(NamedTuple):
    """A report on the load of a base model.

    Attributes:
        seconds: total time.
        bytes_read: bytes read from files; 0 if Transformers read them.
        way: files, cache (of quantized weights) or transformers (by its own reader).
    """

    seconds: float
    bytes_read: int
    way: str


class _Loaded(NamedTuple):
    """A loaded model; `copy` is the cache to write its 4-bit weights to."""

    base: Any
    missing: list[str]
    bytes_read: int
    way: str
    copy: QuantizedCache | None = None


def compute_dtype(model: Model, machine: Machine) -> torch.dtype:
    """Return the dtype that `model.dtype` means on this machine."""
    return named_dtype(model.dtype, machine.dtype)


def load_tokenizer(source: BaseSource, data: Data | None = None) -> Any:
    """Load the tokenizer of a base model, always a fast one, with padding on the left for generation.

    Args:
        source: base model.
        data: settings of a run, whose tokens are added; None: it is the base's own.

    Raises:
        UserError: it cannot be loaded, or has a token already that the run adds.
    """
    shared().start()  # its process renders templates, and imports Transformers meanwhile
    from transformers import AutoTokenizer

    if source.kind != "hub":
        own_files(Path(source.location), "*.jinja")  # the template is shipped unchanged with the adapter
    with loading(source, "tokenizer"):
        require_own_class(f"model.base = {source.name}", source.location)
        require_sizes(source.location, f"model.base = {source.name}", source.revision, source.only_local)
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, local_files_only=source.only_local, trust_remote_code=False
        )
        tokenizer("a")  # invalid settings fail here, and not within a row
    if not tokenizer.is_fast:
        raise UserError(
            f"model.base = {source.name}: its tokenizer has no fast version",
            "convert it with Transformers' convert_slow_tokenizer",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # Only generation pads with it; training does not use the id.
    tokenizer.padding_side = "left"
    if data is not None:
        add_tokens(tokenizer, data)
    return tokenizer


def load_model(
    source: BaseSource,
    model: Model,
    quantization: Quantization | None,
    machine: Machine,
    to_host: bool = False,
) -> Any:
    """Load the base model to the machine's device, frozen.

    Args:
        source: base model.
        model: settings of the model.
        quantization: settings of 4-bit weights; None: as they are stored.
        machine: machine, whose device and memory count.
        to_host: whether 4-bit weights, embeddings and head of a model for a GPU stay in the host's memory, from where
            the fused engine streams them; without a GPU, or 4-bit weights, it means nothing.

    Raises:
        UserError: it cannot be found or loaded, or its files lack weights, or the host's memory is too small for it.
        torch.OutOfMemoryError: it does not fit.
    """
    return load_base(source, model, quantization, machine, to_host)[0]


def load_base(
    source: BaseSource,
    model: Model,
    quantization: Quantization | None,
    machine: Machine,
    to_host: bool = False,
) -> tuple[Any, LoadReport]:
    """Load the base model like `load_model`, and return a report with it."""
    started = time.perf_counter()
    settings = settings_of(model, quantization, machine)
    with loading(source, "model"):
        folder = local_folder(source)
        if folder is not None and (folder / "generation_config.json").is_file():  # Transformers ignores a damaged one
            read_json(folder / "generation_config.json", fix="fetch it again, or delete it if it is not needed")
        loaded = _load(source, settings, quantization, machine.device, to_host and machine.device == "cuda")
    if loaded.missing:
        raise UserError(
            f"model.base = {source.name}: its files lack {len(loaded.missing)} weights "
            f"({', '.join(loaded.missing[:3])}, ...); they would be random",
            "name a complete model",
        )
    base = loaded.base
    base_stop_ids(getattr(base, "generation_config", None), f"model.base = {source.name}: generation_config.json")
    freeze(base)
    if machine.device == "cuda":
        torch.cuda.synchronize()
    report = LoadReport(time.perf_counter() - started, loaded.bytes_read, loaded.way)
    if loaded.copy is not None:
        loaded.copy.write(base)
    if machine.device == "cpu":
        add_dense_copies(base, machine.free_bytes)
    return base, report


def freeze(base: Any) -> None:
    """Put a loaded base into the state that adapters are attached in: frozen, in evaluation mode, without a cache."""
    base.requires_grad_(False)
    keep_4bit_layout(base)
    base.config.use_cache = False
    base.eval()


def base_stop_ids(settings: Any, file: str) -> set[int]:
    """Return the tokens at which a base's settings end an answer (`eos_token_id`: a number, a list of them, or none).

    Args:
        settings: configuration object, or content of a JSON file.
        file: name of the file, for messages.

    Raises:
        UserError: they are no token ids.
    """
    named = settings.get("eos_token_id") if isinstance(settings, dict) else getattr(settings, "eos_token_id", None)
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if wrong := [number for number in ids if type(number) is not int or abs(number) >= 2**31]:
        raise UserError(f"{file}: eos_token_id names {str(wrong[0])[:40]!r}, which is no token id", "fetch it again")
    return set(ids)


def settings_of(model: Model, quantization: Quantization | None, machine: Machine) -> dict[str, Any]:
    """Return the arguments of `from_pretrained`, except the location."""
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


def _load(
    source: BaseSource, settings: dict[str, Any], quantization: Quantization | None, device: str, to_host: bool
) -> _Loaded:
    checkpoint = find_checkpoint(source, quantization) if device in ("cuda", "cpu") else None
    if checkpoint is None:
        if to_host:
            raise UserError(
                f"model.base = {source.name}: it does not fit the GPU, and only safetensors in 16 or 32 bits, or in "
                "bitsandbytes' 4 bits, are loaded to the host's memory",
                "name a smaller model.base, or convert it",
            )
        base, missing = load_plainly(source, settings)
        return _Loaded(base, missing, 0, "transformers")
    to_host = to_host and (quantization is not None or checkpoint.is_quantized)
    copy = None
    if quantization is not None and quantization.cache and not checkpoint.is_quantized:
        copy = QuantizedCache.of(source, checkpoint.files, quantization, settings["dtype"], device)
        cached = copy.find()
        if cached is not None:
            loaded = _load_cached(source, checkpoint, cached, settings, device, to_host)
            if loaded is not None:
                return loaded
    if to_host and not checkpoint.is_quantized:
        quantizing = quantizing_of(checkpoint.config, settings, device)
        if not fits_host(host_bytes(checkpoint.pieces, quantizing)):
            return _load_mapped(source, checkpoint, settings, quantizing, copy)
    base, missing, bytes_read = stream(source, checkpoint, settings, device, to_host=to_host)
    return _Loaded(base, missing, bytes_read, "files", copy)


def _load_cached(
    source: BaseSource,
    checkpoint: Checkpoint,
    cached: CachedWeights,
    settings: dict[str, Any],
    device: str,
    to_host: bool,
) -> _Loaded | None:
    """Load the model from its cached 4-bit weights; None, with a notice, if they are damaged."""
    try:
        quantized = checkpoint.quantized_as(settings["quantization_config"].to_dict(), cached.pieces)
        base, missing, bytes_read = stream(source, quantized, settings, device, cached.checksums, to_host)
        reason = f"it lacks {missing[0]}" if missing else ""
    except torch.OutOfMemoryError:
        raise  # the copy is not damaged
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if reason:
        notify_unusable(cached.folder, reason)
        gc.collect()  # free what was loaded before the next attempt
        return None
    return _Loaded(base, missing, bytes_read, "cache")


def _load_mapped(
    source: BaseSource,
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    quantizing: Quantizing,
    copy: QuantizedCache | None,
) -> _Loaded:
    """Load a 16-bit base whose 4-bit weights fit neither GPU nor host: write the cached copy first, and map that."""
    needed = host_bytes(checkpoint.pieces, quantizing)
    if copy is None:
        why = "they can be memory-mapped from a cached copy, which quantization.cache = false leaves out"
        raise short_of_memory(source, needed, why, "set quantization.cache=true")

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        ranges: dict[str, torch.Tensor] = {}
        yield from quantized_tensors(checkpoint.pieces, quantizing, ranges)
        require_finite(source, ranges)  # while the copy is not complete

    if (reason := copy.write_tensors(tensors, MOST_PARTS * len(checkpoint.pieces), needed)) is not None:
        why = f"they cannot be memory-mapped from a cached copy either, which cannot be written ({reason})"
        raise short_of_memory(source, needed, why, "free disk space")
    cached = copy.find()
    assert cached is not None, "it has just been written"
    quantized = checkpoint.quantized_as(settings["quantization_config"].to_dict(), cached.pieces)
    base, missing, bytes_read = stream(source, quantized, settings, quantizing.device, cached.checksums, to_host=True)
    return _Loaded(base, missing, bytes_read, "cache")


def load_plainly(source: BaseSource, settings: dict[str, Any]) -> tuple[Any, list[str]]:
    """Load by Transformers' own reader; return the model and the names of weights that its files lack."""
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": source.location,
        "local_files_only": source.only_local,
    }
    if source.revision:
        where["revision"] = source.revision
    folder = Path(source.location)
    size = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else sys.maxsize  # not known
    with collect_cycles(size, settings["device_map"][""]):
        base, report = AutoModelForCausalLM.from_pretrained(
            **where, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **settings
        )
    ranges: dict[str, torch.Tensor] = {}
    for name, parameter in base.named_parameters():
        note_range(ranges, name, parameter.data)
    require_finite(source, ranges)
    return base, sorted(report["missing_keys"])


def keep_4bit_layout(base: Any) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights on CPUs with AVX-512 bf16.

    It would repack at the first forward in evaluation mode, for faster inference: permanently, with the blocks'
    constants rounded to bf16, and without a gradient, so that training after an evaluation would learn nothing.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def loading(source: BaseSource, what: str) -> Iterator[None]:
    """Within the context, libraries are quiet, and their errors over a model's files become one message."""
    named = f"model.base = {source.name}: the {what}"
    message, fix = f"{named} cannot be loaded", "name another model.base"
    if source.kind == "hub":
        message = f"{named} cannot be fetched from the hub"
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
