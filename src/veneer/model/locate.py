"""What `model.base` names. The answer is a folder that Transformers can load, or a hub id.

Order: a built-in name, a path that exists, a hub id of the form owner/name (`veneer.config.names`). Built-in models
and .gguf files are converted once to a folder in the user's cache.
"""

from dataclasses import dataclass
from pathlib import Path

from veneer.config import Model
from veneer.config.hub import unreachable
from veneer.config.names import find_model
from veneer.model.builtin import builtin_folder
from veneer.model.gguf import converted_folder


@dataclass(frozen=True)
class BaseSource:
    """Where a base model's files are.

    Attributes:
        kind: builtin, folder, gguf or hub.
        location: A folder, or a hub id; what `from_pretrained` takes.
        name: What the user wrote.
        revision: Of a hub model.
    """

    kind: str
    location: str
    name: str
    revision: str | None = None

    @property
    def only_local(self) -> bool:
        """Whether it is a hub's, and the hub cannot be asked: what its cache holds is all there is."""
        return self.kind == "hub" and unreachable() is not None

    @property
    def reference(self) -> str:
        """The name by which PEFT and Transformers find the weights from any folder: an absolute path, or a hub id."""
        return self.location if self.kind == "hub" else str(Path(self.location).absolute())


def locate(model: Model) -> BaseSource:
    """Resolve `model.base`; fetches and converts a built-in model or a .gguf file on first use.

    Raises:
        UserError: Nothing of that name exists, or the folder holds no model.
    """
    kind, place = find_model(model)
    if kind == "builtin":
        place = str(builtin_folder(place))
    elif kind == "gguf":
        place = str(converted_folder(Path(place)))
    return BaseSource(kind, place, model.base, model.revision)
