"""Converts a .gguf file once to a bf16 safetensors folder in the user's cache.

Transformers reads the weights and builds the tokenizer, but always splits text as GPT-2 does. The file names its real
pre-tokenizer (`tokenizer.ggml.pre`); for those in PRE_TOKENIZERS the tokenizer is corrected, since a model that gets
other tokens than in training is silently worse. An unknown one is left as it is, with a warning.
"""

import contextlib
import io
import json
import mmap
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from veneer.config.cache import cached
from veneer.config.files import file_sha256, reading
from veneer.config.notify import notify
from veneer.model.limits import require_possible
from veneer.model.quiet import quiet


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Split digits first, then as GPT-2."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


# None: Transformers builds the right one.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer] | None] = {
    "smollm": _smollm,
    "gpt-2": None,
}


def converted_folder(file: Path) -> Path:
    """Return the converted folder of a .gguf file, keyed by its content."""
    digest = (file_sha256(file) or "")[:12]
    return cached(f"models/{file.stem}-{digest}", lambda folder: convert(file, folder))


def convert(file: Path, folder: Path) -> None:
    """Write weights (bf16), configuration, tokenizer and chat template of a .gguf file into a folder.

    Raises:
        UserError: the file is not GGUF, or of an architecture that Transformers cannot read from GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    facts = _facts(file)
    notify(f"converting {file.name} to bf16 (once)", "info", str(file))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # redirect_stderr: the reader's progress bar cannot be turned off otherwise.
    with _transformers_reads(file, facts), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            **where, trust_remote_code=False, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    _fix_tokenizer(tokenizer, str(facts.get("tokenizer.ggml.pre", "default")))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    names = {"name": facts.get("general.name"), "license": facts.get("general.license")}
    source = {"file": file.name, "type": weight_type(file), **names}
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def weight_type(file: Path) -> str | None:
    """Return the type of most of a .gguf file's weights, as Q4_1; None: it holds none.

    Raises:
        UserError: the file is not GGUF.
    """
    counts: Counter[str] = Counter()
    for tensor in open_gguf(file).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return counts.most_common(1)[0][0] if counts else None


def config_of(file: Path) -> Any:
    """Read the configuration in a .gguf file.

    Raises:
        UserError: the file is not GGUF, or of an architecture that Transformers cannot read from GGUF.
    """
    from transformers import AutoConfig

    facts = _facts(file)
    with _transformers_reads(file, facts):
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)


@contextlib.contextmanager
def _transformers_reads(file: Path, facts: dict[str, Any]) -> Iterator[None]:
    kind = facts.get("general.architecture")
    problem = f"{file.name}: Transformers cannot read this GGUF file (architecture {kind})"
    with quiet(), reading(problem, "name the model's original folder or hub id in model.base"):
        yield


def _fix_tokenizer(tokenizer: Any, kind: str) -> None:
    if kind not in PRE_TOKENIZERS:
        notify(
            f"the tokenizer kind {kind!r} of this GGUF file is not checked: compare some token ids "
            "with the original tokenizer before you trust it",
            where="model.base",
        )
        return
    make = PRE_TOKENIZERS[kind]
    if make is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = make()


def _facts(file: Path) -> dict[str, Any]:
    reader = open_gguf(file)
    names = ("general.architecture", "general.name", "general.license", "tokenizer.ggml.pre")
    with reading(file, "name a whole .gguf file"):
        found = {name: reader.fields[name].contents() for name in names if name in reader.fields}
        own = f"{found.get('general.architecture')}."
        sizes = {name: field for name, field in reader.fields.items() if name.startswith(own)}
        require_possible({name.rpartition(".")[2]: field.contents() for name, field in sizes.items()}, str(file))
        return found


def open_gguf(file: Path) -> Any:
    """Open a file by the reader of the package `gguf`, after checking that its header is whole.

    Raises:
        UserError: the file is not GGUF, is truncated, or has an impossible header.
    """
    with reading(f"{file}: not a GGUF file, or a damaged one", "name a whole .gguf file"):
        found = file.stat()
        return _open_once(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)  # the package takes seconds to read a vocabulary
def _open_once(file: Path, modified: int, size: int) -> Any:
    from gguf import GGUFReader

    _require_bounded(file)
    return GGUFReader(file)


# Bytes of a value by its type in the format; strings (8) and arrays (9) store their length.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MAX_ITEMS = 4_000_000  # items of all arrays in a header; a vocabulary of 256k tokens has a fifth of that


def _require_bounded(file: Path) -> None:
    """Raise ValueError or struct.error if lengths and counts in a header exceed its file.

    The package does not check them: a count of 2**60 would never end.
    """
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        order = "<" if data[4:6] != b"\0\0" else ">"
        at, items = 8, 0

        def number(kind: str) -> int:
            nonlocal at
            (found,) = struct.unpack_from(order + kind, data, at)
            at += struct.calcsize(kind)
            return int(found)

        def skip(size: int) -> None:
            nonlocal at
            at += size
            if at > len(data):
                raise ValueError("it ends within its header")

        def value(kind: int) -> None:
            nonlocal items
            if kind == 8:
                skip(number("Q"))
            elif kind == 9:
                item, count = number("I"), number("Q")
                items += count
                if items > MAX_ITEMS:
                    raise ValueError(f"its header holds more than {MAX_ITEMS:,} items")
                for _ in range(count):
                    value(item)
            elif kind in _VALUE_BYTES:
                skip(_VALUE_BYTES[kind])
            else:
                raise ValueError(f"its header holds a value of the unknown type {kind}")

        tensors, fields = number("Q"), number("Q")
        if tensors + fields > len(data) // 8:
            raise ValueError(f"its header names {tensors:,} tensors and {fields:,} fields, more than fit into it")
        for _ in range(fields):
            skip(number("Q"))
            value(number("I"))
