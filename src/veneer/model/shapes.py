"""Finds a model's shapes without its weights, by building it on torch's meta device from its configuration.

This works for any architecture of Transformers, since its own code builds it. The configuration comes from the folder
or the .gguf file, from the user's cache, from the published shapes in known.py, and otherwise from the hub.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from veneer.config import Adapter, Model, UserError
from veneer.config.cache import cache_folder
from veneer.config.files import read_json, reading
from veneer.config.hub import not_here, unreachable
from veneer.config.names import find_model
from veneer.model.builtin import BUILTIN, Builtin
from veneer.model.gguf import config_of
from veneer.model.known import known_shape
from veneer.model.quiet import quiet
from veneer.model.remote import read_config, refusal, require_own_class
from veneer.model.target_modules import find_targets, require_matches
from veneer.model.trainable import FIX


@dataclass(frozen=True)
class Shapes:
    """The shapes of a base model.

    Attributes:
        architecture: class in Transformers.
        weights: shape of every parameter, by name; tied ones once.
        other_bytes: bytes of its buffers.
        linears: inputs and outputs of every linear layer, by path, the head included.
        embeddings: rows and width of every embedding, by path.
        head: path of the output layer.
        depth: number of decoder layers.
        period: number of layers after which they repeat; None: they do not.
        key_value_bytes: bytes of the generation cache for a token, in 16 bits.
        vocabulary: number of tokens.
        positions: longest sequence it can read; None: no limit known.
        beside: paths of layers that text does not pass, as those of a vision tower.
        tokens: path of the embeddings of tokens.
        transposed: paths of linear layers whose weights are transposed (Conv1D of Transformers).
    """

    architecture: str
    weights: Mapping[str, tuple[int, ...]]
    other_bytes: int
    linears: Mapping[str, tuple[int, int]]
    embeddings: Mapping[str, tuple[int, int]]
    head: str | None
    depth: int
    period: int | None
    key_value_bytes: int
    vocabulary: int
    positions: int | None
    beside: frozenset[str] = frozenset()
    tokens: str | None = None
    transposed: frozenset[str] = frozenset()

    @property
    def is_tied(self) -> bool:
        """Whether the head shares the weights of the embeddings."""
        return self.head is not None and f"{self.head}.weight" not in self.weights

    def side(self, path: str) -> tuple[int, int]:
        """Return the rows (tokens) and the width of an embedding or of the head."""
        return self.embeddings[path] if path in self.embeddings else self.linears[path][::-1]

    @property
    def total(self) -> int:
        """The number of parameters."""
        return sum(prod(shape) for shape in self.weights.values())

    @property
    def experts(self) -> float:
        """The share of parameters that are experts' matrices, stacked in parameters that are no linear layers."""
        stacked = (prod(shape) for name, shape in self.weights.items() if len(shape) == 3 and "expert" in name)
        return sum(stacked) / self.total

    def quantizable(self) -> frozenset[str]:
        """Return paths of the layers that bitsandbytes quantizes: all linear ones but the head."""
        return frozenset(path for path in self.linears if path != self.head)

    def targets(self, adapter: Adapter | str | tuple[str, ...]) -> frozenset[str]:
        """Return paths of the modules that an adapter is on.

        Args:
            adapter: section `adapter` of a run, or its `target_modules` alone.

        Raises:
            UserError: a pattern of it matches nothing.
        """
        adapter = adapter if isinstance(adapter, Adapter) else Adapter(target_modules=adapter)
        paths = [path for path in (*self.linears, *self.embeddings) if path not in self.beside]
        linear = [path for path in paths if path in self.linears and path != self.head]
        found = find_targets(
            paths, linear, adapter.target_modules, adapter.exclude_modules, adapter.layers_to_transform
        )
        require_matches("rank_pattern", adapter.rank_pattern, found)
        require_matches("alpha_pattern", adapter.alpha_pattern, found)
        return found


def find_config(model: Model) -> Any:
    """Find the configuration of a base model; no weights are fetched or read.

    Raises:
        UserError: there is no such model, its folder holds no configuration, or Transformers does not know its kind.
    """
    kind, location = find_model(model)
    if kind == "builtin":
        folder = cache_folder() / "models" / location
        return _load(folder, model) if folder.is_dir() else _published_builtin(BUILTIN[location])
    if kind == "gguf":
        return config_of(Path(location))
    if kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(location, "config.json", revision=model.revision)
        if isinstance(cached, str):
            return _load(Path(cached).parent, model)
        if (published := _published(location)) is not None:
            return published
    return _load(location, model)


def is_stored_in_4_bits(config: Any) -> bool:
    """Return whether a base's files are in bitsandbytes' 4-bit format already."""
    stored = getattr(config, "quantization_config", None) or {}
    return bool(stored.get("load_in_4bit") if isinstance(stored, dict) else getattr(stored, "load_in_4bit", False))


def is_local(model: Model, files: tuple[str, ...] = ("model.safetensors", "model.safetensors.index.json")) -> bool:
    """Return whether one of these files of a base is on this machine, or must still be fetched."""
    kind, location = find_model(model)
    if kind == "builtin":
        return (cache_folder() / "models" / location).is_dir()
    if kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        return any(isinstance(try_to_load_from_cache(location, file, revision=model.revision), str) for file in files)
    return True


def _published_builtin(builtin: Builtin) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**builtin.sizes) if builtin.sizes else _published(builtin.hub_id)


def _published(name: str) -> Any:
    from transformers import AutoConfig

    known = known_shape(name)
    if known is None:
        return None
    return AutoConfig.for_model(known[0], **{"dtype": "bfloat16"} | known[1])


def _load(location: str | Path, model: Model) -> Any:
    from transformers import CONFIG_MAPPING

    name = f"model.base = {model.base}"
    file = Path(location) / "config.json"
    if file.is_file():
        kind = read_json(file, fix="name a whole model").get("model_type")
        if kind not in CONFIG_MAPPING:
            require_own_class(name, location)
            near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3, cutoff=0.3)
            raise UserError(
                f"{name}: Transformers knows no architecture `{kind}` (model_type in config.json); "
                f"nearest: {', '.join(near)}",
                "update transformers, or name another model.base",
            )
    is_hub = not Path(location).exists()
    why = unreachable() if is_hub else None
    message = f"{name}: its configuration cannot be {'fetched' if is_hub else 'read'}"
    fix = "check config.json"
    if is_hub:
        fix = "check the name (there is no folder of that name either), the network and your access (hf auth login)"
    with quiet(), reading(message, fix):
        try:
            return read_config(location, name, model.revision, why is not None)
        except (OSError, ValueError) as error:
            if (refused := refusal(name, location, error)) is not None:
                raise refused from None
            if why is not None:
                raise not_here(message, why) from None
            raise


def build(config: Any, dtype: torch.dtype, depth: int | None = None, attention: str = "auto") -> Any:
    """Build the base model on the meta device, with its own or another number of layers.

    Raises:
        UserError: the architecture is no causal language model, or its configuration is damaged.
    """
    from transformers import AutoModelForCausalLM

    if depth not in (None, config.get_text_config().num_hidden_layers):
        config = type(config).from_dict(config.to_dict())
        text = config.get_text_config()
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:depth]
    message = f"model.base: the architecture {config.model_type} cannot be built as config.json describes it"
    with quiet(), reading(message, "check config.json"), torch.device("meta"):
        settings = {"attn_implementation": "eager"} if attention == "eager" else {}
        try:
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **settings)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise UserError(
                f"model.base: the architecture {config.model_type} does not write text token by token",
                FIX,
            ) from None
    base.config.use_cache = False
    return base


def shapes_of(base: Any) -> Shapes:
    """Return the shapes of a model on the meta device."""
    from transformers.pytorch_utils import Conv1D

    config = base.config.get_text_config()
    text = {id(module) for module in base.get_decoder().modules()} if config is not base.config else None
    linears, embeddings, head, tokens, beside, transposed = {}, {}, None, None, set(), set()
    for path, module in base.named_modules():
        if text is not None and id(module) not in text:
            beside.add(path)
        if isinstance(module, torch.nn.Linear) and not _is_its_own(module):
            linears[path] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            linears[path] = (module.weight.shape[0], module.weight.shape[1])
            transposed.add(path)
        elif isinstance(module, torch.nn.Embedding):
            embeddings[path] = (module.num_embeddings, module.embedding_dim)
        if module is base.get_output_embeddings():
            head = path
        if module is base.get_input_embeddings():
            tokens = path
    all_heads = getattr(config, "num_attention_heads", None) or 0  # 0: it has no attention, and no growing cache
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, all_heads)
    return Shapes(
        architecture=type(base).__name__,
        weights={name: tuple(parameter.shape) for name, parameter in base.named_parameters()},
        other_bytes=sum(b.numel() * b.element_size() for b in base.buffers()),
        linears=linears,
        embeddings=embeddings,
        head=head,
        depth=config.num_hidden_layers,
        period=_period(base),
        key_value_bytes=2 * 2 * heads * width * config.num_hidden_layers,
        vocabulary=config.vocab_size,
        positions=positions_of(config),
        beside=frozenset(beside & (linears.keys() | embeddings.keys()) - {head}),
        transposed=frozenset(transposed),
        tokens=tokens,
    )


def positions_of(config: Any) -> int | None:
    """Return the longest sequence a model can read; None: no limit is known.

    A configuration that was extended by YaRN keeps the old number, beside a factor and what that refers to.
    """
    positions: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if positions is None or rope.get("rope_type") != "yarn" or not original or not factor:
        return positions
    return max(positions, int(original * factor))


def _is_its_own(linear: Any) -> bool:
    """Return whether a model's own subclass of a linear layer computes something else, as Llama 4's router."""
    kind = type(linear)
    return kind.__module__.startswith("transformers.models.") and kind.forward is not torch.nn.Linear.forward


def decoder_layers(base: Any) -> list[Any]:
    """Return the model's decoder layers: the longest list of modules in the text model."""
    of_text = base if base.config.get_text_config() is base.config else base.get_decoder()
    lists = [list(module) for module in of_text.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def _period(base: Any) -> int | None:
    """Return the number of layers after which the decoder repeats; None if it does not, or fewer than four times."""
    layers = decoder_layers(base)
    config = base.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    if len(layers) != config.num_hidden_layers:
        return None
    signs = [
        (kind, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()))
        for kind, layer in zip(kinds, layers)
    ]
    for period in range(1, len(signs) // 4 + 1):
        if all(sign == signs[n % period] for n, sign in enumerate(signs)):
            return period
    return None
