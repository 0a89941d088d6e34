"""A .gguf file as a bf16 safetensors folder, converted once and kept in the user's cache.

Transformers reads the weights and builds the tokenizer, but always splits text the way GPT-2 does. The file says
how its tokenizer really splits (`tokenizer.ggml.pre`); for the kinds in PRE_TOKENIZERS that is put right, since a
model that sees other tokens than it was trained on is silently worse. An unknown kind is left as it is, and said.
"""

import contextlib
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from veneer.config import UserError
from veneer.config.cache import cached
from veneer.model.quiet import quiet


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit by itself first, then as GPT-2."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


# None: what Transformers builds is right.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer] | None] = {
    "smollm": _smollm,
    "gpt-2": None,
}


def converted_folder(file: Path) -> Path:
    """The converted folder of a .gguf file, keyed by its content."""
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return cached(f"models/{file.stem}-{digest[:12]}", lambda folder: convert(file, folder))


def convert(file: Path, folder: Path) -> None:
    """Write weights (bf16), configuration, tokenizer and chat template of a .gguf file into a folder.

    Raises:
        UserError: The file is not GGUF, or of an architecture that Transformers cannot read from GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    facts = _facts(file)
    print(f"converting {file.name} to bf16 (once)", file=sys.stderr)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # redirect_stderr: the reader draws a bar that nothing else turns off.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise _cannot_read(file, facts, error) from None
    _mend_tokenizer(tokenizer, str(facts.get("tokenizer.ggml.pre", "default")))
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
    """The type that most of a .gguf file's weights have, as Q4_1; None: it holds none.

    Raises:
        UserError: The file is not GGUF.
    """
    counts: Counter[str] = Counter()
    for tensor in _reader(file).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return counts.most_common(1)[0][0] if counts else None


def config_of(file: Path) -> Any:
    """The configuration in a .gguf file.

    Raises:
        UserError: The file is not GGUF, or of an architecture that Transformers cannot read from GGUF.
    """
    from transformers import AutoConfig

    facts = _facts(file)
    with quiet():
        try:
            return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise _cannot_read(file, facts, error) from None


def _cannot_read(file: Path, facts: dict[str, Any], error: Exception) -> UserError:
    return UserError(
        f"{file.name}: Transformers cannot read this GGUF file "
        f"(architecture {facts.get('general.architecture')}): {error}",
        "name the model's original folder or hub id in model.base",
    )


def _mend_tokenizer(tokenizer: Any, kind: str) -> None:
    if kind not in PRE_TOKENIZERS:
        print(
            f"warning: the tokenizer kind {kind!r} of this GGUF file is not checked: compare some token ids with "
            "the original tokenizer before you trust it",
            file=sys.stderr,
        )
        return
    make = PRE_TOKENIZERS[kind]
    if make is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = make()


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"model.base = {file}: not a GGUF file ({error})", "name a .gguf file") from None


def _facts(file: Path) -> dict[str, Any]:
    reader = _reader(file)
    names = ("general.architecture", "general.name", "general.license", "tokenizer.ggml.pre")
    return {name: reader.fields[name].contents() for name in names if name in reader.fields}
