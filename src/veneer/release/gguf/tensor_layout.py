"""The layout of a model in a GGUF file: names and layouts of its tensors, and its metadata.

The `gguf` package owns the names; what differs between Transformers' definition of a family and llama.cpp's stands in
model/families/. A setting that llama.cpp's architecture has no word for is refused, not dropped.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from veneer.config import UserError
from veneer.model.families import FAMILIES

COMPUTED = (".rotary_emb.inv_freq",)  # ends of tensors in old checkpoints that every runtime computes for itself
Transform = Callable[[torch.Tensor], torch.Tensor]


class TensorLayout:
    """Names and layouts of one model's tensors in GGUF.

    Args:
        config: Transformers' configuration.
        base: Name of the model as the user wrote it.

    Raises:
        UserError: The family cannot be exported, or a setting of the model has no counterpart there.
    """

    def __init__(self, config: Any, base: str) -> None:
        import gguf

        family = FAMILIES.get(config.model_type)
        if family is None or family.gguf is None:
            known = ", ".join(known.title for known in FAMILIES.values() if known.gguf)
            raise UserError(
                f"model.base = {base}: the architecture {config.model_type} cannot be exported to GGUF; "
                f"these can: {known}",
                "serve the folder that `veneer merge` writes, or convert that folder with llama.cpp's own converter",
            )
        self.family, self.format = family, family.gguf
        self.config = config
        self.depth: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads or self.heads
        self.head_width: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self._base = base
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.format.arch)
        self._map = gguf.get_tensor_name_map(arch, self.depth)
        self.warnings: list[str] = []
        self._require_known()

    def name(self, tensor: str) -> str:
        """Return a tensor's name in GGUF.

        Raises:
            UserError: llama.cpp's architecture has no such tensor.
        """
        found = self._map.get_name(tensor, try_suffixes=(".weight", ".bias")) or self._map.get_name(
            f"model.{tensor}", try_suffixes=(".weight", ".bias")
        )
        if found is None:
            raise UserError(
                f"model.base = {self._base}: the tensor {tensor} has no name in llama.cpp's {self.format.arch}",
                "serve the folder that `veneer merge` writes",
            )
        return str(found)

    def transform(self, tensor: str) -> Transform | None:
        """Return the function that lays a tensor out for GGUF; None: the layout is the same."""
        if self.format.pairs_are_neighbours:
            if ".q_proj." in tensor:
                return lambda weight: interleaved(weight, self.heads)
            if ".k_proj." in tensor:
                return lambda weight: interleaved(weight, self.kv_heads)
        if self.family.norm_offset and tensor.endswith("norm.weight"):
            return lambda weight: weight.float() + self.family.norm_offset
        return None

    def metadata(self) -> dict[str, Any]:
        """Return the model's sizes and settings by their GGUF keys, as plain ints, floats and strings."""
        config, rope = self.config, _rope(self.config)
        found: dict[str, Any] = {
            "context_length": self._context_length(),
            "embedding_length": config.hidden_size,
            "block_count": self.depth,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
            "rope.dimension_count": int(self.head_width * rope.get("partial_rotary_factor", 1.0)),
            "vocab_size": config.vocab_size,
        }
        is_unusual = self.head_width != config.hidden_size // self.heads
        if self.format.head_width == "always" or (self.format.head_width == "unusual" and is_unusual):
            found |= {"attention.key_length": self.head_width, "attention.value_length": self.head_width}
        found |= {key: kind(getattr(config, name) or 0) for key, name, kind in self.format.settings}
        kind = rope.get("rope_type", "default")
        if kind in ("linear", "yarn"):
            found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind in ("yarn", "longrope"):
            original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            found["rope.scaling.original_context_length"] = original
            if kind == "longrope":
                scale = config.max_position_embeddings / original
                factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
                found["rope.scaling.attn_factor"] = factor
        return {f"{self.format.arch}.{key}": value for key, value in found.items()}

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """Return tensors that stand for settings in GGUF: the factors of scaled rotary frequencies."""
        rope = _rope(self.config)
        if rope.get("rope_type") == "llama3":
            return {"rope_freqs.weight": llama3_factors(rope, self.head_width)}
        if rope.get("rope_type") == "longrope":
            return {
                f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
                for which in ("long", "short")
            }
        return {}

    def _context_length(self) -> int:
        positions: int = self.config.max_position_embeddings
        window = self._dropped_window()
        return min(positions, window) if window else positions

    def _dropped_window(self) -> int | None:
        """Return a sliding window that llama.cpp's architecture does not support."""
        if any(name == "sliding_window" for _, name, _ in self.format.settings):
            return None
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and "sliding_attention" not in kinds:
            return None
        window: int | None = getattr(self.config, "sliding_window", None)
        return window

    def _require_known(self) -> None:
        config = self.config
        kind = _rope(config).get("rope_type", "default")
        if kind not in self.format.rope_types:
            raise self._no_word(f"rotary frequencies of the kind {kind}")
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation not in ("silu", "swish", "gelu_pytorch_tanh"):
            raise self._no_word(f"the activation {activation}")
        if (refused := self.format.refusal(config)) is not None:
            raise self._no_word(refused)
        if window := self._dropped_window():
            self.warnings.append(
                f"llama.cpp's {self.format.arch} has no sliding window; the file's context is therefore {window:,} "
                f"tokens, the window of this model, instead of {config.max_position_embeddings:,}"
            )

    def _no_word(self, what: str) -> UserError:
        return UserError(
            f"model.base = {self._base}: llama.cpp's {self.format.arch} does not support {what}",
            "serve the folder that `veneer merge` writes",
        )


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows of Q or K so that the two halves of each rotary pair are neighbours; [out, in] or a bias [out]."""
    rest = weight.shape[1:]
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *rest)
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def llama3_factors(rope: dict[str, Any], width: int) -> torch.Tensor:
    """Compute Llama 3.1's divisors of rotary frequencies: 1 for short waves, `factor` for long ones, else a blend."""
    frequencies = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    waves = 2 * math.pi / frequencies
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    blend = ((original / waves - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - blend) / factor + blend)
    return factors.float()


def _rope(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    return found
