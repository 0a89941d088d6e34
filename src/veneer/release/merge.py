"""Merge: base and adapter become one model on disk, tensor by tensor; and unmerge, its inverse.

Each adapted weight is W + delta in float32, rounded once to the precision that is written. Nothing is held but the
tensor at hand, so a model of any size merges in 2 GiB plus its largest tensor. What the adapter does not touch is
copied as bytes. Tensors keep the base's names and order.

An adapter can be merged into the base in 16 bits, or into what training computed with: the base quantized to 4 bits
and dequantized again (`on="nf4"`). The second is the model that was evaluated; the first is nearer to the original
base, and differs from what was trained by the error of quantization.

Beside the weights go the tokenizer and the chat template of the training, the base's configuration and a generation
configuration that names every token at which an answer ends: without it a server goes on talking.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import veneer
from veneer.config import UserError
from veneer.config.folder import whole_folder, write_json
from veneer.release.fold import Fold, four_bit_modules, through_four_bits
from veneer.release.origin import Origin
from veneer.release.passport import read_passport
from veneer.release.weights import SHARD_BYTES, Planned, Stored, bytes_of, weights_of, write_weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ON = ("base", "nf4")
Progress = Callable[[int], None]
PIECE = 8 * 2**20  # elements that are cast at a time
ROWS_ELEMENTS = 2**20  # of a weight that are merged at a time: 4 MiB of float32
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class Merged:
    """What was written."""

    out: str
    dtype: str
    on: str
    tensors: int
    changed: int
    bytes: int
    files: int
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge_into(
    origin: Origin,
    out: Path,
    dtype: str = "bfloat16",
    on: str = "base",
    shard_bytes: int = SHARD_BYTES,
    on_done: Progress = lambda done: None,
) -> Merged:
    """Write the merged model into a new folder.

    Args:
        origin: The adapter and its base.
        out: The folder; it appears whole or not at all.
        dtype: bfloat16, float16 or float32.
        on: base: the base as it is; nf4: the base as training computed with it, quantized and dequantized.
        shard_bytes: Largest file.
        on_done: Called with the number of bytes just written.

    Raises:
        UserError: Base and adapter do not fit together, a file is damaged, the folder is in use or has no space, or
            a value does not fit float16.
    """
    require_known("--dtype", dtype, DTYPES)
    require_free(out)
    folder = origin.base_folder
    tensors = weights_of(folder, f"model.base = {origin.model.base}")
    fold = Fold(origin, tensors)
    recipe = Recipe(origin, fold, on)
    planned = [_plan(recipe, name, stored, DTYPES[dtype]) for name, stored in (tensors | fold.untied).items()]
    require_space(out, sum(tensor.size for tensor in planned))
    with whole_folder(out) as unfinished:
        write_weights(unfinished, [_told(tensor, on_done) for tensor in planned], {"format": "pt"}, shard_bytes)
        _write_config(origin, folder, unfinished, dtype, fold.unties)
        write_companions(origin, folder, unfinished)
        facts = {"adapter": origin.name, "dtype": dtype, "on": on, "veneer": veneer.__version__}
        write_json(unfinished / "merge.json", facts | {"passport": read_passport(origin.adapter)})
        files = len(list(unfinished.glob("*.safetensors")))
    size = sum(tensor.size for tensor in planned)
    return Merged(str(out), dtype, on, len(planned), len(fold.changed), size, files, _warnings(origin, dtype, on))


def unmerge_from(merged: Path, origin: Origin, out: Path, on_done: Progress = lambda done: None) -> Merged:
    """Take an adapter out of a merged model: what is left is its base, within the rounding of the merge.

    Args:
        merged: Folder of the merged model.
        origin: The adapter that is in it, with its base's configuration.
        out: A new folder.
        on_done: Called with the number of bytes just written.

    Raises:
        UserError: As `merge`, or the kind of adapter cannot be taken out.
    """
    require_free(out)
    if not (merged / "config.json").is_file():
        raise UserError(f"{merged}: holds no model (no config.json)", "name the folder that `veneer merge` wrote")
    tensors = weights_of(merged, str(merged))
    fold = Fold(origin, tensors)
    fold.require_subtractable()

    def plan(name: str, stored: Stored) -> Planned:
        if name not in fold.changed:
            return Planned(name, stored.dtype, stored.shape, stored.chunks)
        return Planned(
            name,
            stored.dtype,
            stored.shape,
            lambda: rounded(fold.unmerged(name, stored.read()), stored.dtype, name),
        )

    planned = [plan(name, stored) for name, stored in tensors.items()]
    require_space(out, sum(tensor.size for tensor in planned))
    with whole_folder(out) as unfinished:
        write_weights(unfinished, [_told(tensor, on_done) for tensor in planned], {"format": "pt"})
        kept = [*merged.glob("*.json"), *merged.glob("*.jinja"), *merged.glob("tokenizer.model")]
        for path in kept:
            if path.name not in ("merge.json", "certificate.json", "model.safetensors.index.json"):
                shutil.copy2(path, unfinished / path.name)
        files = len(list(unfinished.glob("*.safetensors")))
    size = sum(tensor.size for tensor in planned)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return Merged(str(out), dtype, "merged", len(planned), len(fold.changed), size, files, ())


class Recipe:
    """The value of each tensor of a merged model, before it is rounded.

    Args:
        origin: The adapter and its base.
        fold: The adapter's changes.
        on: base, or nf4.

    Raises:
        UserError: `on` is nf4, and training did not quantize.
    """

    def __init__(self, origin: Origin, fold: Fold, on: str) -> None:
        require_known("--on", on, ON)
        self._origin, self._fold = origin, fold
        self._quantized: set[str] = set()
        if on == "nf4":
            if origin.quantization is None:
                raise UserError(
                    f"{origin.name}: --on nf4, but the adapter was trained on a base that was not quantized",
                    "merge it into the base itself: --on base",
                )
            paths = four_bit_modules(fold.config, origin.quantization)
            self._quantized = {fold.name_on_disk(f"{path}.weight") for path in paths}

    def changes(self, name: str) -> bool:
        """Whether a tensor differs from the base's."""
        return name in self._fold.changed or name in self._quantized

    def value(self, name: str, stored: Stored) -> torch.Tensor:
        """A tensor of the merged model: float32 where the adapter changes it, else in its own precision."""
        weight = self.base_value(name, stored)
        return self._fold.merged(name, weight) if name in self._fold.changed else weight

    def rounded(self, name: str, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the merged model in the precision that is written.

        Where the change is a product of two thin matrices it is made a few rows at a time, in the processor's cache:
        the same sums in the same order as PEFT's, in a third of the time.
        """
        thin = self._fold.low_rank(name)
        if thin is None or thin[0].dtype != torch.float32:
            return rounded(self.value(name, stored), dtype, name)
        weight = self.base_value(name, stored)
        b_OR, a_RI, scale = thin
        out = torch.empty_like(weight, dtype=dtype)
        step = max(1, ROWS_ELEMENTS // weight.shape[1])

        # A block is one thread's, since threads that share each small operation wait for each other most of the time;
        # and it is made in one buffer, since memory asked for anew costs more than the arithmetic.
        threads = torch.get_num_threads()

        def fill(first: int) -> None:
            buffer = torch.empty(step, weight.shape[1])
            for at in range(first * step, len(weight), threads * step):
                rows = weight[at : at + step]
                sums = torch.mm(b_OR[at : at + step], a_RI, out=buffer[: len(rows)]).mul_(scale).add_(rows)
                if dtype == torch.float16:
                    rounded(sums, dtype, name)
                out[at : at + step] = sums

        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(fill, range(threads)))
        finally:
            torch.set_num_threads(threads)
        return out

    def base_value(self, name: str, stored: Stored) -> torch.Tensor:
        """What the adapter is merged into."""
        weight = stored.read()
        if name not in self._quantized:
            return weight
        assert self._origin.quantization is not None
        transposed = self._fold.is_transposed(name)
        return through_four_bits(weight, self._origin.quantization, self._origin.dtype, transposed)


def _plan(recipe: Recipe, name: str, stored: Stored, dtype: torch.dtype) -> Planned:
    if stored.is_float and recipe.changes(name):
        return Planned(name, dtype, stored.shape, lambda: recipe.rounded(name, stored, dtype))
    if not stored.is_float or stored.dtype == dtype:
        return Planned(name, stored.dtype, stored.shape, stored.chunks)
    return Planned(name, dtype, stored.shape, lambda: cast_pieces(stored, dtype))


def _told(tensor: Planned, on_done: Progress) -> Planned:
    """The same, telling when it has been made."""

    def make() -> torch.Tensor | Iterator[memoryview]:
        made = tensor.make()
        on_done(tensor.size)
        return made

    return Planned(tensor.name, tensor.dtype, tensor.shape, make)


def rounded(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor in another precision, rounded once to nearest.

    Raises:
        UserError: A finite value has become infinite: it is beyond float16.
    """
    result = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != torch.float16 and not result.isfinite().all():
        largest = float(tensor.float().abs().nan_to_num(posinf=0.0).max())
        if largest > torch.finfo(torch.float16).max:
            raise UserError(
                f"{name}: holds {largest:,.0f}, the largest number of float16 is 65,504: it would become infinite",
                "write bfloat16 or float32 with --dtype",
            )
    return result


def cast_pieces(stored: Stored, dtype: torch.dtype) -> Iterator[memoryview]:
    """A tensor's bytes in another precision, a piece at a time, so that the largest need never be held whole."""
    size = stored.dtype.itemsize
    for at in range(0, stored.size, PIECE * size):
        length = min(PIECE * size, stored.size - at)
        part = Stored(stored.name, stored.file, stored.dtype, (length // size,), stored.start + at, length)
        yield bytes_of(rounded(part.read(), dtype, stored.name))


def require_known(option: str, value: str, known: Iterable[str]) -> None:
    """Raises UserError for a value that is not among those an option takes."""
    if value not in known:
        raise UserError(f"{option} {value}: not known", f"write one of {', '.join(known)}")


def require_free(out: Path) -> None:
    """Raises UserError if a folder to be made is a file or holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is a file" if not out.is_dir() else "is not empty"
        raise UserError(f"--out {out}: {what}", "name a new folder with --out")


def require_space(out: Path, needed: int) -> None:
    """Raises UserError if the disk has no room for what is to be written, or cannot be written."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is a file", "name another folder with --out")
    free = shutil.disk_usage(parent).free
    if free < 1.02 * needed:
        raise UserError(
            f"--out {out}: {free / 2**30:,.2f} GiB free, {1.02 * needed / 2**30:,.2f} GiB needed",
            "free space, or name a folder on another disk with --out",
        )


def write_companions(origin: Origin, base: Path, out: Path) -> None:
    """Tokenizer and template of the training, generation configuration, licence."""
    for name in TOKENIZER_FILES:
        if (origin.tokenizer_folder / name).is_file():
            shutil.copyfile(origin.tokenizer_folder / name, out / name)
    for pattern in ("LICENSE*", "NOTICE*", "USE_POLICY*"):
        for path in base.glob(pattern):
            shutil.copyfile(path, out / path.name)
    kept = _json_of(base / "generation_config.json")
    write_json(out / "generation_config.json", kept | {"eos_token_id": stop_ids(origin, base)})


def stop_ids(origin: Origin, base: Path) -> list[int]:
    """Every token at which an answer ends: those training taught, and those the base itself names."""
    ids = origin.renderer().stop_ids | set((read_passport(origin.adapter) or {}).get("stop_token_ids", []))
    for file in ("config.json", "generation_config.json"):
        named = _json_of(base / file).get("eos_token_id")
        ids |= set(named) if isinstance(named, list) else {named} - {None}
    return sorted(ids)


def _write_config(origin: Origin, base: Path, out: Path, dtype: str, unties: bool) -> None:
    config = _json_of(base / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    if unties:
        config["tie_word_embeddings"] = False
    config.pop("quantization_config", None)
    ids = stop_ids(origin, base)
    config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    write_json(out / "config.json", config)


def _json_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _warnings(origin: Origin, dtype: str, on: str) -> tuple[str, ...]:
    found = []
    if dtype == "float16":
        found.append(
            "float16 holds numbers up to 65,504 only: a model that was trained in bfloat16 can overflow in its "
            "activations even though its weights fit; the certificate looks for it"
        )
    if dtype == "float32":
        found.append(
            "float32 takes twice the space and memory of bfloat16 and is no better than it unless it is tested"
        )
    if on == "base" and origin.quantization is not None:
        found.append(
            "the adapter was trained on a 4-bit base and is merged into the 16-bit one: close, but not the model that "
            "was evaluated; --on nf4 merges into what training computed with"
        )
    return tuple(found)
