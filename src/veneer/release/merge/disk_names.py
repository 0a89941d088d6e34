"""Maps the parameters of a model to their names and layouts in the base's files.

Mostly a parameter is a tensor of the same name, with or without the model's own prefix. Transformers renames some as it
loads them (the head of GPT-NeoX), and stacks others: the experts of a Mixture of Experts are one parameter in memory
and a tensor each in the files. Its own table says how, and is read backwards here, as `save_pretrained` does, so that a
merged model has the names and the order of its base's files.
"""

from collections.abc import Mapping
from typing import Any

import torch

from veneer.config import UserError
from veneer.model.tuned import TunedModel
from veneer.release.weights import Stored


class DiskNames:
    """The names on disk of a model's parameters.

    Args:
        base: The model, on the meta device.
        tensors: The base's tensors on disk.
        tied: Embeddings and head by each other's name, where they are one tensor.
        tuned: Adapter and base, for messages.

    Attributes:
        names: Name on disk of each parameter that is one tensor.
        parts: Names on disk of each parameter that is several tensors, or has another layout than in memory.

    Raises:
        UserError: The files lack a tensor, or hold it in another shape, or are quantized.
    """

    def __init__(self, base: Any, tensors: Mapping[str, Stored], tied: Mapping[str, str], tuned: TunedModel) -> None:
        self._base, self._tensors, self._tuned = base, tensors, tuned
        self._prefix = f"{base.base_model_prefix}."
        self._conversions = _conversions(base)
        self.names: dict[str, str] = {}
        self.parts: dict[str, tuple[str, ...]] = {}
        missing = []
        for parameter, value in base.named_parameters(remove_duplicate=False):
            found = self._find(parameter, tied.get(parameter))
            if found is not None:
                self.names[parameter] = found
                self._require(found, value)
            elif self._find_parts(parameter, value):
                continue
            elif (partner := tied.get(parameter)) and self._find_parts(partner, value):
                self.names[parameter] = self.names[partner]
            else:
                missing.append(parameter)
        if missing:
            raise UserError(
                f"model.base = {tuned.model.base}: its files lack {len(missing)} tensors of a {type(base).__name__}: "
                + ", ".join(missing[:3]),
                "name a complete base of the same architecture with --base",
            )

    def on_disk(self, parameter: str, change: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split a change of a parameter into tensors as its files have them, by name; for those in `parts` only."""
        return {self._spelled(name): tensor for name, tensor in self._reverted(parameter, change).items()}

    def _find(self, parameter: str, partner: str | None) -> str | None:
        """Find the tensor of a parameter, or of the one it is tied to; None: none has the same shape and layout."""
        for name in (parameter, partner) if partner else (parameter,):
            for spelled in self._spellings(name):
                if spelled in self._tensors:
                    return spelled
        return None

    def _spellings(self, name: str) -> tuple[str, str, str]:
        """Return the name with the model's own prefix and without."""
        return name, name.removeprefix(self._prefix), self._prefix + name

    def _spelled(self, name: str) -> str:
        return next((spelled for spelled in self._spellings(name) if spelled in self._tensors), name)

    def _find_parts(self, parameter: str, value: torch.Tensor) -> bool:
        """Look a parameter up in Transformers' table of names on disk; returns whether it was found."""
        found = self.on_disk(parameter, value) if self._conversions else {}
        if not found or not found.keys() <= self._tensors.keys():
            return False
        for name, part in found.items():
            self._require(name, part)
        if len(found) == 1 and next(iter(found.values())) is value:
            self.names[parameter] = next(iter(found))
        else:
            self.parts[parameter] = tuple(found)
        return True

    def _reverted(self, parameter: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        # Where Transformers looks for what it is to undo; the model is on the meta device and this merge's own.
        self._base._weight_conversions = self._conversions
        try:
            reverted: dict[str, torch.Tensor] = revert_weight_conversion(self._base, {parameter: value})
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError):
            return {}  # it is made of several parameters together
        return reverted

    def _require(self, name: str, value: torch.Tensor) -> None:
        stored, base = self._tensors[name], self._tuned.model.base
        if stored.shape != tuple(value.shape):
            raise UserError(
                f"model.base = {base}: {name} has the shape {list(stored.shape)}, its config.json expects "
                f"{list(value.shape)}",
                "name a base whose files belong together with --base",
            )
        if not stored.is_float:
            raise UserError(
                f"model.base = {base}: {name} is stored in {str(stored.dtype).removeprefix('torch.')}: the base's "
                "files are already quantized",
                "name the 16-bit original with --base",
            )


def _conversions(base: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    found = get_model_conversion_mapping(base, add_legacy=False)
    return [conversion for conversion in found if not isinstance(conversion, PrefixChange)]
