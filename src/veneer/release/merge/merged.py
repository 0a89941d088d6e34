"""Merge: base and adapter become one model on disk, tensor by tensor; and unmerge, its inverse.

Each adapted weight is W + delta in float32, rounded once to the precision that is written. Nothing is held but the
tensor at hand, so a model of any size merges in 2 GiB plus its largest tensor. What the adapter does not touch is
copied as bytes. Tensors keep the base's names and order.

An adapter is merged into what training computed with: for QLoRA the base quantized to 4 bits and dequantized again,
which is the model that was evaluated. The base in 16 bits (`on="base"`) is nearer to the original base, but the adapter
was not trained on it: another model than was judged, and on the demo a worse one (docs/release.md).

Beside the weights go the tokenizer and the chat template of the training, the base's configuration and a generation
configuration that decodes as the run was judged, greedily, and names every token at which an answer ends: without it a
server goes on talking.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.config import UserError
from veneer.config.files import own_files, read_optional_json
from veneer.config.folder import whole_folder, write_json
from veneer.config.options import require_known
from veneer.model.tuned import TunedModel
from veneer.release.merge.adapter_delta import AdapterDelta
from veneer.release.merge.plan import MergePlan, cast_pieces, resolved_base, rounded
from veneer.release.merge.stored_4bit import base_weights
from veneer.release.output import require_free, require_space
from veneer.release.redact import name_of
from veneer.release.weights import SHARD_BYTES, PlannedTensor, Stored, weights_of, write_weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Progress = Callable[[int], None]
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        difference: largest difference of a classifier's scores or embeddings from the adapter's; None: it writes text,
            and `veneer certify` measures it.
    """

    out: str
    dtype: str
    on: str
    tensors: int
    changed: int
    bytes: int
    files: int
    warnings: tuple[str, ...]
    choice: dict[str, Any] | None = None
    difference: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge_into(
    tuned: TunedModel,
    out: Path,
    dtype: str = "bfloat16",
    on: str = "trained",
    shard_bytes: int = SHARD_BYTES,
    on_done: Progress = lambda done: None,
    choice: dict[str, Any] | None = None,
) -> Merged:
    """Write the merged model into a new folder.

    Args:
        tuned: The adapter and its base.
        out: The folder; it appears whole or not at all.
        dtype: bfloat16, float16 or float32.
        on: trained: what training computed with, nf4 or base; nf4: the base quantized and dequantized; base: as it is.
        shard_bytes: Largest file.
        on_done: Callback that gets the number of bytes just written.
        choice: Measurement of `--on best`, kept in merge.json.

    Raises:
        UserError: Base and adapter do not fit together, a file is damaged, the folder is in use or has no space, or
            a value does not fit float16.
    """
    require_known("--dtype", dtype)
    on = resolved_base(tuned, on)
    require_free(out)
    folder = tuned.base_folder
    own_files(folder, *LICENCES)  # refused before the work
    tensors = base_weights(tuned)
    delta = AdapterDelta(tuned, tensors)
    merge_plan = MergePlan(tuned, delta, on)
    planned = [_plan(merge_plan, name, stored, DTYPES[dtype]) for name, stored in (tensors | delta.untied).items()]
    require_space(out, sum(tensor.size for tensor in planned))
    with whole_folder(out) as unfinished:
        write_weights(unfinished, [_reported(tensor, on_done) for tensor in planned], {"format": "pt"}, shard_bytes)
        _write_config(tuned, folder, unfinished, dtype, delta.unties)
        write_companions(tuned, folder, unfinished)
        inside = tuned.weights_sha256
        facts = {"adapter": name_of(tuned.name), "adapter_sha256": inside, "dtype": dtype, "on": on, "choice": choice}
        facts |= {"veneer": veneer.__version__}
        write_json(unfinished / "merge.json", facts | {"passport": tuned.passport})
        files = len(list(unfinished.glob("*.safetensors")))
    size = sum(tensor.size for tensor in planned)
    warnings = _warnings(tuned, dtype, on)
    return Merged(str(out), dtype, on, len(planned), len(delta.changed), size, files, warnings, choice)


def unmerge_from(
    merged: Path, tuned: TunedModel, out: Path, force: bool = False, on_done: Progress = lambda done: None
) -> Merged:
    """Take an adapter out of a merged model: what is left is its base, within the rounding of the merge.

    Args:
        merged: Folder of the merged model.
        tuned: The adapter that is in it, with its base's configuration, or the merged model's own.
        out: A new folder.
        force: Go on although another adapter was merged.
        on_done: Callback that gets the number of bytes just written.

    Raises:
        UserError: As `merge`, another adapter is in it, or the kind of adapter cannot be taken out.
    """
    require_free(out)
    require_model(merged)
    warnings = _require_merged(merged, tuned, force)
    tensors = weights_of(merged, str(merged))
    delta = AdapterDelta(tuned, tensors)
    delta.require_subtractable()

    def plan(name: str, stored: Stored) -> PlannedTensor:
        if name not in delta.changed:
            return PlannedTensor(name, stored.dtype, stored.shape, stored.chunks)
        return PlannedTensor(
            name,
            stored.dtype,
            stored.shape,
            lambda: rounded(delta.unmerged(name, stored.read()), stored.dtype, name),
        )

    planned = [plan(name, stored) for name, stored in tensors.items()]
    require_space(out, sum(tensor.size for tensor in planned))
    with whole_folder(out) as unfinished:
        write_weights(unfinished, [_reported(tensor, on_done) for tensor in planned], {"format": "pt"})
        for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
            if (merged / name).is_file():
                shutil.copyfile(merged / name, unfinished / name)
        copy_licence(merged, unfinished)
        files = len(list(unfinished.glob("*.safetensors")))
    size = sum(tensor.size for tensor in planned)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return Merged(str(out), dtype, "merged", len(planned), len(delta.changed), size, files, warnings)


def _plan(merge_plan: MergePlan, name: str, stored: Stored, dtype: torch.dtype) -> PlannedTensor:
    if stored.is_float and merge_plan.changes(name):
        return PlannedTensor(name, dtype, stored.shape, lambda: merge_plan.rounded(name, stored, dtype))
    if not stored.is_float or stored.dtype == dtype:
        return PlannedTensor(name, stored.dtype, stored.shape, stored.chunks)
    return PlannedTensor(name, dtype, stored.shape, lambda: cast_pieces(stored, dtype))


def _reported(tensor: PlannedTensor, on_done: Progress) -> PlannedTensor:
    """Wrap a tensor so that it calls `on_done` once it is made."""

    def make() -> torch.Tensor | Iterator[memoryview]:
        made = tensor.make()
        on_done(tensor.size)
        return made

    return PlannedTensor(tensor.name, tensor.dtype, tensor.shape, make)


def write_companions(tuned: TunedModel, base: Path, out: Path) -> None:
    """Write tokenizer and template of the training, generation configuration and licence."""
    for name in TOKENIZER_FILES:
        if (tuned.tokenizer_folder / name).is_file():
            shutil.copyfile(tuned.tokenizer_folder / name, out / name)
    copy_licence(base, out)
    kept = read_optional_json(base / "generation_config.json")
    ids = {name: kept[name] for name in ("bos_token_id", "pad_token_id") if name in kept}
    write_json(out / "generation_config.json", ids | {"do_sample": False, "eos_token_id": tuned.stop_ids})


def copy_licence(source: Path, out: Path) -> None:
    """Copy the licence and notices of a base."""
    for path in own_files(source, *LICENCES):
        shutil.copyfile(path, out / path.name)


def require_model(merged: Path) -> None:
    """Raise UserError where a folder holds no model."""
    if not (merged / "config.json").is_file():
        raise UserError(f"{merged}: holds no model (no config.json)", "name the folder that `veneer merge` wrote")


def _require_merged(merged: Path, tuned: TunedModel, force: bool) -> tuple[str, ...]:
    """Return warnings of a merged model from which an adapter is to be taken.

    Raises:
        UserError: Another adapter is in it.
    """
    kept = read_optional_json(merged / "merge.json")
    inside = kept.get("adapter_sha256")
    if inside is None:
        return (
            f"{merged} does not say what is in it (no merge.json): if this adapter is not, what is left is no base",
        )
    if inside != tuned.weights_sha256:
        message = f"{merged}: holds another adapter ({kept.get('adapter')}) than {tuned.name}"
        if not force:
            raise UserError(message, "name that one with --adapter, or use --force to continue anyway")
        return (f"--force: {message}",)
    if kept.get("on") == "nf4":
        return ("the adapter was merged into the base in 4 bits: what is left is that base, not the original one",)
    return ()


def _write_config(tuned: TunedModel, base: Path, out: Path, dtype: str, unties: bool) -> None:
    config = read_optional_json(base / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    if unties:
        config["tie_word_embeddings"] = False
    config.pop("quantization_config", None)
    if tuned.added_tokens:
        config.get("text_config", config)["vocab_size"] = tuned.config.get_text_config().vocab_size
    ids = tuned.stop_ids
    config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    write_json(out / "config.json", config)


def _warnings(tuned: TunedModel, dtype: str, on: str) -> tuple[str, ...]:
    found = []
    if tuned.is_full:
        found.append(
            f"all weights were trained, so nothing is merged: {tuned.adapter} is a whole model, and this its copy"
        )
    if dtype == "float16":
        found.append(
            "float16 holds numbers up to 65,504 only: a model that was trained in bfloat16 can overflow in its "
            "activations even though its weights fit; the certificate looks for it"
        )
    if dtype == "float32":
        found.append(
            "float32 takes twice the space and memory of bfloat16 and is no better than it unless it is tested"
        )
    if on == "base" and tuned.quantization is not None:
        found.append(
            "the adapter was trained and judged on its base in 4 bits and is merged into the 16-bit one: another model "
            "than was judged; the certificate says how its score compares"
        )
    return tuple(found)
