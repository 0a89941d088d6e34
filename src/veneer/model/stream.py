"""Loads a safetensors checkpoint through Transformers, but reads it itself: in large pieces, in threads, to the device.

Transformers builds the model, renames, converts, quantizes, ties and checks as it always does, since it gets the
checkpoint as a state dict, as its `from_pretrained` documents. The entries of that state dict are no tensors yet but
handles (handles.py) that Transformers resolves one by one; the reader, which is a little ahead, then gives each tensor
on the device. A linear layer is quantized as soon as it is read, and its 16-bit weight freed. A layer stored in 4 bits
has six tensors in its file; its handle combines them, since Transformers copies a set of patterns for each.

The result is therefore equal bit for bit; `tests/unit/test_stream.py` compares every tensor. Transformers' own reader
loads all other models (rare dtypes, other quantizers, models of several parts).
"""

import contextlib
import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from veneer.config import Quantization, UserError
from veneer.config.notify import notify
from veneer.model.handles import handles_of
from veneer.model.host import fits_host, host_bytes, move_rest, quantizing_of
from veneer.model.locate import BaseSource
from veneer.model.reader import MappedFiles, Reader
from veneer.model.remote import read_config
from veneer.model.shards import Piece, UnknownTypeError, find_files, read_headers

LARGE_BYTES = 64 * 2**20


class Checkpoint(NamedTuple):
    """A checkpoint that can be streamed.

    Attributes:
        config: configuration of the model.
        files: safetensors files.
        pieces: tensors, in the order in which they are loaded.
    """

    config: Any
    files: list[Path]
    pieces: list[Piece]

    @property
    def is_quantized(self) -> bool:
        """Whether it is in bitsandbytes' 4-bit format already."""
        return bool(getattr(self.config, "quantization_config", None))

    def quantized_as(self, stored: dict[str, Any], pieces: list[Piece]) -> "Checkpoint":
        """Return the same model with the tensors of a 4-bit copy."""
        config = copy.deepcopy(self.config)
        config.quantization_config = stored
        return Checkpoint(config, [], pieces)


def find_checkpoint(source: BaseSource, quantization: Quantization | None) -> Checkpoint | None:
    """Find the checkpoint of a base model; None if Transformers must load it.

    Raises:
        UserError: it is quantized in another way than the run asks for.
        DamagedError: a file is truncated or is no safetensors file.
        OSError, ValueError: its configuration cannot be read.
    """
    config = read_config(source.location, f"model.base = {source.name}", source.revision, source.only_local)
    stored = _stored(config)
    if stored is not None:
        _require_agreement(source, stored, quantization)
    has_adapter = (Path(source.location) / "adapter_config.json").exists()
    is_other = stored is not None and not stored.get("load_in_4bit")
    if _class_of(config) is None or has_adapter or is_other or getattr(config, "transformers_weights", None):
        return None
    files = find_files(source)
    if files is None:
        return None
    try:
        return Checkpoint(config, files, read_headers(files))
    except UnknownTypeError:
        return None


def _class_of(config: Any) -> Any:
    """Return the class of the causal language model; None unless it is a single class for this configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found if getattr(found, "config_class", None) is type(config) else None


def _stored(config: Any) -> dict[str, Any] | None:
    """Return the quantization that the checkpoint declares."""
    stored = getattr(config, "quantization_config", None)
    return stored if stored is None or isinstance(stored, dict) else dict(stored.to_dict())


def _require_agreement(source: BaseSource, stored: dict[str, Any], quantization: Quantization | None) -> None:
    if quantization is None:
        return
    if stored.get("quant_method") != "bitsandbytes" or not stored.get("load_in_4bit"):
        kind = "8-bit bitsandbytes" if stored.get("load_in_8bit") else stored.get("quant_method")
        raise UserError(
            f"quantization.bits = {quantization.bits}: model.base = {source.name} is quantized already, in {kind}",
            "leave the section quantization out, or name the base in 16 bits",
        )
    for setting, asked, found in (
        ("quant_type", quantization.quant_type, stored.get("bnb_4bit_quant_type", "fp4")),
        ("double_quant", quantization.double_quant, stored.get("bnb_4bit_use_double_quant", False)),
    ):
        if asked != found:
            given, right = (str(value).lower() for value in (asked, found))
            raise UserError(
                f"quantization.{setting} = {given}: model.base = {source.name} is quantized already, with {right}",
                f"write quantization.{setting}={right}, leave the section quantization out, "
                "or name the base in 16 bits",
            )


def stream(
    source: BaseSource,
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    device: str,
    checksums: dict[str, list[int]] | None = None,
    to_host: bool = False,
) -> tuple[Any, list[str], int]:
    """Load a checkpoint; return the model, the names of weights that its files lack, and the bytes read.

    A load to the host gives Transformers a checkpoint in 4 bits, since Transformers itself quantizes where weights end.
    Where the host's memory is short, files in 4 bits are memory-mapped.

    Args:
        source: source of configuration and generation settings.
        checkpoint: checkpoint to load.
        settings: arguments of `from_pretrained`.
        device: cpu or cuda.
        checksums: argument of `Reader`.
        to_host: whether 4-bit weights, embeddings and head stay in the host's memory; see host.py.

    Raises:
        UserError: a tensor has another shape than the configuration says, or is not finite.
        DamagedError, OSError: a file cannot be read.
        Others: all that Transformers raises.
    """
    quantizing = None
    reader: Reader | MappedFiles = Reader(checkpoint.pieces, "cpu" if to_host else device, checksums)
    if to_host:
        settings = settings | {"device_map": {"": "cpu"}}
        if not checkpoint.is_quantized:
            quantizing = quantizing_of(checkpoint.config, settings, device)
            checkpoint = checkpoint.quantized_as(settings["quantization_config"].to_dict(), checkpoint.pieces)
        elif not fits_host(host_bytes(checkpoint.pieces)):
            reader = MappedFiles(checkpoint.pieces, checksums)
            folder = checkpoint.pieces[0].file.parent
            notify(f"the host's memory is short: weights are memory-mapped from {folder}", "info", "model.base")
    config = checkpoint.config
    if (stored := _stored(config)) is not None:
        config.quantization_config = stored | {"bnb_4bit_compute_dtype": str(settings["dtype"]).removeprefix("torch.")}
        settings = {key: value for key, value in settings.items() if key != "quantization_config"}
    size = sum(piece.size for piece in checkpoint.pieces)
    ranges: dict[str, torch.Tensor] = {}
    with collect_cycles(size, device), reader:
        try:
            base, report = _class_of(config).from_pretrained(
                None,
                config=config,
                state_dict=handles_of(checkpoint.pieces, reader, ranges, quantizing),
                ignore_mismatched_sizes=True,  # they are reported, and refused below
                output_loading_info=True,
                trust_remote_code=False,
                **settings,
            )
        except RuntimeError:
            if reader.failure is not None:
                raise reader.failure from None
            raise
    _require_shapes(source, base, report)
    require_finite(source, ranges)
    if stored is not None:
        # Transformers records a conversion of 4-bit weights for save_pretrained, where it then fails.
        vars(base).pop("_weight_conversions", None)
        for module in base.modules():
            if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
                module.weight.module, module.quant_state = module, state
    if to_host:
        move_rest(base, device)
    base.name_or_path = base.config.name_or_path = source.location
    base.generation_config = _generation_config(source)
    return base, sorted(report["missing_keys"]), reader.bytes_read


def require_finite(source: BaseSource, ranges: dict[str, torch.Tensor]) -> None:
    """Raise UserError if weights are NaN or infinite; training would give NaN whatever its settings."""
    found = torch.stack([both.cpu() for both in ranges.values()]).isfinite().all(1).tolist() if ranges else []
    bad = [name for name, is_finite in zip(ranges, found) if not is_finite]
    if bad:
        raise UserError(
            f"model.base = {source.name}: {bad[0]} holds NaN or infinite numbers"
            + (f" ({len(bad)} tensors do)" if len(bad) > 1 else ""),
            "fetch the model again, or name another model.base",
        )


@contextlib.contextmanager
def collect_cycles(size: int, device: str) -> Iterator[None]:
    """Collect reference cycles that a load of so many bytes leaves, which hold up to 8% of the weights again.

    Only if that matters: visiting all objects of torch and transformers takes 0.3 s. Older garbage is collected first,
    since it may hold another base. Objects that the program itself has frozen stay so.
    """
    if size <= LARGE_BYTES:
        yield
        return
    if device == "cpu" or torch.cuda.memory_allocated():
        gc.collect()
    is_frozen = gc.get_freeze_count() > 0
    if not is_frozen:
        gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        if not is_frozen:
            gc.unfreeze()


def _generation_config(source: BaseSource) -> Any:
    from transformers import GenerationConfig

    where: dict[str, Any] = {
        "pretrained_model_name": source.location,
        "revision": source.revision,
        "local_files_only": source.only_local,
    }
    try:
        return GenerationConfig.from_pretrained(**where)
    except OSError:
        return GenerationConfig.from_pretrained(**where, config_file_name="config.json", _from_model_config=True)


def _require_shapes(source: BaseSource, base: Any, report: dict[str, Any]) -> None:
    """Raise UserError for the first tensor of another shape. Transformers does not check those that it quantizes."""
    wrong = [(name, tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"]]
    for name, module in base.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            wrong.append((f"{name}.weight", tuple(state.shape), (module.out_features, module.in_features)))
    if wrong:
        name, found, wanted = min(wrong)
        raise UserError(
            f"model.base = {source.name}: {name} has the shape {list(found)} in its files, and {list(wanted)} by its "
            f"configuration" + (f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else ""),
            "name a model whose files and config.json belong together",
        )
