"""A cache of keys and values in which each row stands at a position of its own.

Transformers' caches grow all rows by a token together, so a row that has ended stays until the last one of its batch
has. Here a row of the cache is a slot: a prompt's keys and values are copied into it, its tokens follow at the slot's
own positions, and the next prompt takes it over. The buffers stay where they are, so a step can be recorded as a CUDA
graph.

Only models of rotary positions whose cache is plain keys and values of all tokens are served: positions come from
`position_ids` alone there. Windows, recurrent states, learned positions and rotations that depend on the longest row
of a batch are not.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from veneer.kernels.launch import compiles
from veneer.kernels.write_slots import write_slots

STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def has_slots(model: Any) -> bool:
    """Return whether a model, of Transformers or PEFT, can be answered for in slots."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        rope.get("rope_type") in STATIC_ROPE
        and "mrope_section" not in rope
        and not getattr(config, "alibi", False)
        and config._attn_implementation in ("sdpa", "eager")
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
        and model._supports_logits_to_keep()
    )


@dataclass
class SlotView:
    """Positions of the slots, as all layers see them.

    Attributes:
        position_S: Position of each slot's current token, int64; changed in place by whoever decodes.
        width: Positions of each slot that attention reads.
        seen: Most tokens that a slot holds before its current one.
    """

    position_S: torch.Tensor
    width: int = 0
    seen: int = 0

    def __post_init__(self) -> None:
        self.slot_S = torch.arange(len(self.position_S), device=self.position_S.device)

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Return what is added to attention's scores, [slots, 1, 1, width]: each row sees its own tokens so far."""
        sees_SL = torch.arange(self.width, device=self.position_S.device) <= self.position_S[:, None]
        return torch.zeros_like(sees_SL, dtype=dtype).masked_fill_(~sees_SL, torch.finfo(dtype).min)[:, None, None]


class SlotLayer(CacheLayerMixin):
    """Keys and values of a decoder layer: S slots, H heads, L positions, D width of a head.

    Args:
        like: Layer that has read a prompt, for heads and widths.
        length: Positions of each slot.
        view: Positions of the slots.
    """

    is_sliding = False

    def __init__(self, like: Any, length: int, view: SlotView) -> None:
        super().__init__()
        slots = len(view.position_S)
        # Zeros: what no row has written is masked, but a NaN times 0 would be a NaN.
        self.keys, self.values = (
            part.new_zeros((slots, part.shape[1], length, part.shape[3])) for part in (like.keys, like.values)
        )
        self.is_initialized = True
        self._view = view

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the buffers are made at the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write each slot's new token, [S, H, 1, D], in place; return what stands at the first `width` positions."""
        view = self._view
        if compiles(self.keys.device):
            write_slots(self.keys, self.values, key_states[:, :, 0], value_states[:, :, 0], view.position_S)
        else:
            self.keys[view.slot_S, :, view.position_S] = key_states[:, :, 0]
            self.values[view.slot_S, :, view.position_S] = value_states[:, :, 0]
        return self.keys[:, :, : view.width], self.values[:, :, : view.width]

    def first(self, view: SlotView) -> "SlotLayer":
        """Return a layer of the first slots in the same buffers, as many as the view has positions."""
        layer = copy(self)
        slots = len(view.position_S)
        layer.keys, layer.values, layer._view = self.keys[:slots], self.values[:slots], view
        return layer

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return width and offset of a mask."""
        return self._view.width, 0

    def get_seq_length(self) -> int:
        """Return the most tokens that a slot holds before its current one."""
        return self._view.seen

    def get_max_length(self) -> int:
        """Return the positions of a slot."""
        return int(self.keys.shape[2])


class SlotCache(Cache):
    """Keys and values of all layers.

    Args:
        like: Cache of prompts that the model has read.
        length: Positions of each slot.
        view: Positions of the slots.
    """

    def __init__(self, like: DynamicCache, length: int, view: SlotView) -> None:
        super().__init__(layers=[SlotLayer(layer, length, view) for layer in like.layers])

    def first(self, view: SlotView) -> "SlotCache":
        """Return a cache of the first slots in the same buffers, as many as the view has positions."""
        cache = copy(self)
        cache.layers = [layer.first(view) for layer in self.layers]
        return cache

    def admit(self, slot: int, prompts: DynamicCache, row: int, tokens: int) -> None:
        """Copy the first tokens of a row of a cache into a slot."""
        for layer, prompt in zip(self.layers, prompts.layers, strict=True):
            layer.keys[slot, :, :tokens] = prompt.keys[row, :, :tokens]
            layer.values[slot, :, :tokens] = prompt.values[row, :, :tokens]
