"""Rotary positions, as both engines need them."""

from typing import Any


def switch_of(config: Any) -> int | None:
    """Return the length beyond which documents get other angles (longrope: Phi-3 with 128k); None: all get the same."""
    rope = getattr(config, "rope_parameters", None) or {}
    switch: int | None = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return switch
