"""Computes what an adapter adds to each tensor of its base, one module at a time.

The arithmetic is PEFT's own: the model is built hollow (one zero stands for all its weights), the adapter is put on
it, and each adapted module gets its real weight in float32 just for as long as PEFT merges it. So every kind of
adapter that PEFT can merge is merged here (LoRA, rsLoRA, DoRA, LoHa, LoKr, IA3, OFT, ...), to the bit as
`merge_and_unload` does in float32, while one module is in memory instead of a model. Whole replaced modules
(`modules_to_save`) and trained biases take the base's place.

Embeddings that are tied to the head come apart when an adapter changes one of them, and not both as one: PEFT's adapter
changes what one of the two does, so a merge into the shared tensor would change the other as well. They are apart from
the start where the base's files hold two that differ, whatever config.json says: Transformers loads them so.

Every tensor of the adapter must end in a tensor of the merged model; a kind of layer of which that is not so is
refused, since a merge that leaves a part out looks like any other.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from veneer.config import Quantization, UserError
from veneer.model.adapters.lora import MOVES_THE_BASE, low_rank
from veneer.model.quiet import quiet
from veneer.model.shapes import build
from veneer.model.tuned import TunedModel
from veneer.release.merge.disk_names import DiskNames
from veneer.release.merge.stored_4bit import StoredNF4
from veneer.release.weights import Stored, read_header

ADAPTER = "default"
PARAMETERS_HELD = 2  # of experts, whose tensors alternate on disk: what goes in and what comes out of a layer


class AdapterDelta:
    """The changes an adapter makes to the tensors of a base.

    Args:
        tuned: The adapter and its base.
        tensors: The base's tensors on disk.

    Attributes:
        config: The base's configuration.
        changed: Names of the tensors that the adapter changes.
        packed: Names of the tensors that the base's files hold in 4 bits.
        embeddings: The parameter that holds them.
        unties: Whether embeddings and head are two tensors from now on.
        untied: Tensors to be written beside the base's own, by name, and the tensor on disk each begins as.

    Raises:
        UserError: The adapter is for another architecture or other shapes, or PEFT cannot merge its kind.
    """

    def __init__(self, tuned: TunedModel, tensors: Mapping[str, Stored]) -> None:
        self.config = tuned.config
        self._where = tuned.name
        base = build(self.config, torch.float32)
        self._tied = _tied(base)
        self._disk = DiskNames(base, tensors, self._tied, tuned)
        self._names = self._disk.names
        self.unties = bool(self._tied) and _heads_differ(self._tied, self._names, tensors)
        if self.unties:
            self._tied = {}
        self._transposed = _transposed(base, self._names)
        self.embeddings = next(
            f"{path}.weight" for path, module in base.named_modules() if module is base.get_input_embeddings()
        )
        self._zero = torch.zeros(1)
        saved = {} if tuned.is_full else _saved_embeddings(base, tuned)
        _hollow(base, self._zero)
        self._model: Any = None if tuned.is_full else _attached(base, tuned, saved)
        self._changes_both = self._model is not None and _changes_both(self._model)
        self._in_adapter = saved.keys()
        self.packed = {name for name, stored in tensors.items() if isinstance(stored, StoredNF4)}
        self._changes: dict[str, tuple[Any, str]] = {}
        self._part_of: dict[str, str] = {}  # tensors that are parts of a changed parameter, and which
        self._deltas: dict[str, dict[str, torch.Tensor]] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        self.untied: dict[str, Stored] = {}
        if self._model is not None:  # else all weights were trained, and are as they are
            self._find_changes(tensors)
        self._saved = {self._names[parameter]: stored for parameter, stored in saved.items()}

    @property
    def changed(self) -> set[str]:
        return set(self._changes) | set(self._replaced)

    @property
    def is_tied(self) -> bool:
        """Whether embeddings and head are one tensor, in the merged model too."""
        return bool(self._tied) and not self.unties

    def low_rank(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return B, A and the scale where a change is just scale * B @ A; None: only PEFT knows what it is."""
        if name not in self._changes:
            return None
        layer, part = self._changes[name]
        if hasattr(layer, "parameter_name") or name in self._part_of or name in self._saved:
            return None
        found = low_rank(layer) if part == "weight" and isinstance(layer.get_base_layer(), torch.nn.Linear) else None
        if found is None or layer.fan_in_fan_out:
            return None
        return found.b_OR.data, found.a_RI.data, found.scale

    def merged(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """Return the tensor with the adapter in it, float32.

        Args:
            name: Name of a changed tensor.
            base: The base's tensor, any float dtype; a float32 one is changed in place.
        """
        return self._apply(name, base, subtract=False)

    def unmerged(self, name: str, merged: torch.Tensor) -> torch.Tensor:
        """Return the tensor with the adapter taken out again, float32; within rounding of the base's.

        Raises:
            UserError: The kind of adapter cannot be taken out, or replaced the tensor whole.
        """
        if name in self._replaced:
            raise UserError(
                f"{self._where}: the adapter replaced {name} entirely; the original weights are not in it",
                "take the base itself",
            )
        return self._apply(name, merged, subtract=True)

    def name_on_disk(self, parameter: str) -> str:
        """Return a parameter's name in the base's files."""
        return self._names[parameter]

    def is_transposed(self, name: str) -> bool:
        """Return whether a weight is stored as [in, out], as in GPT-2."""
        return name in self._transposed

    def require_subtractable(self) -> None:
        """Raise UserError for kinds of adapters that cannot be taken out of a merged model."""
        config = self._model.peft_config[ADAPTER]
        if getattr(config, "use_dora", False):
            raise UserError(
                f"{self._where}: a DoRA adapter cannot be removed: its scale depends on the base's weights",
                "take the base itself",
            )
        if getattr(config, "trainable_token_indices", None):
            raise UserError(
                f"{self._where}: the adapter replaced rows of embeddings or head; the original ones are not in it",
                "take the base itself",
            )
        if self._replaced:
            self.unmerged(next(iter(self._replaced)), torch.empty(0))

    def _apply(self, name: str, given: torch.Tensor, subtract: bool) -> torch.Tensor:
        if name in self._replaced:
            return self._replaced[name].float()
        layer, which = self._changes[name]
        if name in self._saved and not subtract:
            given = self._saved[name].read()
        # Of experts: PEFT adds it to a parameter, not to a layer's weight.
        if hasattr(layer, "parameter_name") or name in self._part_of:
            delta = self._delta(name, layer)
            return given.float().sub_(delta) if subtract else given.float().add_(delta)
        base_layer = layer.get_base_layer()
        kept = dict(base_layer.named_parameters(recurse=False))
        for part, parameter in kept.items():
            if self._is_hollow(parameter) and part != which:  # stands in for what this call does not ask for
                setattr(base_layer, part, _parameter(torch.zeros(parameter.shape)))
        setattr(base_layer, which, _parameter(given.float()))
        with quiet(), torch.no_grad():
            try:
                if subtract:
                    layer.merged_adapters = [ADAPTER]
                    layer.unmerge()
                else:
                    layer.merge(adapter_names=[ADAPTER])
            except (RuntimeError, NotImplementedError, ValueError) as error:
                raise UserError(f"{self._where}: PEFT cannot merge this adapter into {name}: {error}") from None
        result: torch.Tensor = getattr(base_layer, which).data
        layer.merged_adapters = []
        for part, parameter in kept.items():
            setattr(base_layer, part, parameter)
        return result

    def _delta(self, name: str, layer: Any) -> torch.Tensor:
        """Return the change of a tensor on disk, float32."""
        parameter = self._part_of.get(name)
        if parameter is None:
            return layer.get_delta_weight(ADAPTER).float()  # type: ignore[no-any-return]
        if parameter not in self._deltas:
            while len(self._deltas) >= PARAMETERS_HELD:
                self._deltas.pop(next(iter(self._deltas)))
            self._deltas[parameter] = self._disk.on_disk(parameter, layer.get_delta_weight(ADAPTER).float())
        return self._deltas[parameter][name]

    def _is_hollow(self, parameter: torch.Tensor) -> bool:
        return parameter.data_ptr() == self._zero.data_ptr()

    def _find_changes(self, tensors: Mapping[str, Stored]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        plain = _is_plain_lora(self._model.peft_config[ADAPTER])
        inside: tuple[str, ...] = ()
        for path, module in self._model.get_base_model().named_modules():
            if path.startswith(inside) and inside:
                continue
            before = len(self.changed)
            if self._changes_both and module is self._model.get_output_embeddings():
                inside = (f"{path}.",)  # the embeddings' change is its own
                continue
            if isinstance(module, ModulesToSaveWrapper):
                for part, parameter in module.modules_to_save[ADAPTER].named_parameters():
                    self._replace(f"{path}.{part}", parameter.data, tensors)
            elif isinstance(module, TrainableTokensWrapper):
                self._change(f"{path}.weight", module.token_adapter, "weight", tensors)
            elif isinstance(module, BaseTunerLayer):
                self._find_in_layer(path, module, plain, tensors)
            else:
                for part, parameter in module.named_parameters(recurse=False):
                    if not self._is_hollow(parameter):  # a trained bias outside the adapted modules
                        self._replace(f"{path}.{part}", parameter.data, tensors)
                continue
            inside = (f"{path}.",)
            if len(self.changed) == before:
                raise UserError(
                    f"{self._where}: {path}: PEFT's {type(module).__name__} changes no weight that can be merged",
                    "serve the adapter with PEFT on its base",
                )

    def _find_in_layer(self, path: str, layer: Any, plain: bool, tensors: Mapping[str, Stored]) -> None:
        """Find the changes of an adapted layer; nested layers (several parameters of experts) count as one."""
        around = layer
        while hasattr(around, "parameter_name"):
            self._change(f"{path}.{around.parameter_name}", around, around.parameter_name, tensors)
            around = around.base_layer
        if around is not layer:
            if hasattr(around, "base_layer"):
                raise UserError(
                    f"{self._where}: {path}: an adapter on parameters of an adapted layer cannot be merged",
                    "serve the adapter with PEFT on its base",
                )
            return
        if hasattr(layer, "ln_tuning_layers"):  # trained norms in place of the base's: PEFT swaps whole modules
            for part, parameter in layer.ln_tuning_layers[ADAPTER].named_parameters():
                self._replace(f"{path}.{part}", parameter.data, tensors)
            return
        for part, parameter in layer.get_base_layer().named_parameters(recurse=False):
            if not self._is_hollow(parameter) and f"{path}.{part}" not in self._in_adapter:
                self._replace(f"{path}.{part}", parameter.data, tensors)
            elif part == "weight" or not plain:
                self._change(f"{path}.{part}", layer, part, tensors)

    def _change(self, parameter: str, layer: Any, part: str, tensors: Mapping[str, Stored]) -> None:
        if parameter in self._disk.parts:
            self._require_additive(parameter, layer)
            for name in self._disk.parts[parameter]:
                self._changes[name], self._part_of[name] = (layer, part), parameter
        else:
            self._changes[self._apart(parameter, tensors)] = (layer, part)

    def _require_additive(self, parameter: str, layer: Any) -> None:
        """Raise UserError for a change of several tensors on disk that is not a sum with each of them."""
        if not _is_plain_lora(self._model.peft_config[ADAPTER]) or getattr(layer, "lora_variant", None):
            raise UserError(
                f"{self._where}: {parameter} is several tensors in the base's files, where only plain LoRA can be "
                "merged",
                "serve the adapter with PEFT on its base",
            )

    def _replace(self, parameter: str, value: torch.Tensor, tensors: Mapping[str, Stored]) -> None:
        if parameter in self._disk.parts:
            self._replaced |= self._disk.on_disk(parameter, value)
            return
        self._replaced[self._apart(parameter, tensors)] = value

    def _apart(self, parameter: str, tensors: Mapping[str, Stored]) -> str:
        """Return the name on disk of a parameter that will differ from the base's, and untie it from its partner."""
        partner = self._tied.get(parameter)
        if partner is None or self._changes_both:
            return self._names[parameter]
        self.unties = True
        on_disk = self._names[parameter]
        mine = parameter if parameter in tensors else _like(parameter, on_disk, partner)
        other = partner if partner in tensors else _like(partner, on_disk, parameter)
        for name in (mine, other):
            if name not in tensors:
                self.untied[name] = tensors[on_disk]
        return mine


def four_bit_modules(config: Any, quantization: Quantization) -> set[str]:
    """Return the paths of the modules that training held in 4 bits; Transformers itself chooses them."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    base = build(config, torch.float32)
    before = {path: type(module) for path, module in base.named_modules()}
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization.quant_type)
    with quiet():
        base = replace_with_bnb_linear(base, get_keys_to_not_convert(base), settings)
    return {path for path, module in base.named_modules() if type(module) is not before.get(path)}


def through_four_bits(
    weight: torch.Tensor, quantization: Quantization, dtype: torch.dtype, transposed: bool
) -> torch.Tensor:
    """Quantize and dequantize a weight, as the 4-bit base of training computes with it, in `dtype`."""
    from bitsandbytes import functional as bnb

    given = weight.to(dtype)
    given = given.t().contiguous() if transposed else given
    packed, state = bnb.quantize_4bit(
        given, blocksize=64, compress_statistics=quantization.double_quant, quant_type=quantization.quant_type
    )
    found: torch.Tensor = bnb.dequantize_4bit(packed, state)
    return found.t().contiguous() if transposed else found


def _transposed(base: Any, names: Mapping[str, str]) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {names[f"{path}.weight"] for path, module in base.named_modules() if isinstance(module, Conv1D)}


def _hollow(base: Any, zero: torch.Tensor) -> None:
    """Give a model on the meta device weights on the CPU that take no memory; PEFT leaves what is on meta there."""
    for module in base.modules():
        for part, parameter in module.named_parameters(recurse=False):
            setattr(module, part, _parameter(zero.expand(parameter.shape)))


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _changes_both(model: Any) -> bool:
    """Return whether an adapter trained embeddings and a head that shares their weights as one."""
    head = model.get_output_embeddings()
    follows = getattr(getattr(head, "token_adapter", None), "tied_adapter", None) is not None
    config = model.peft_config[ADAPTER]
    return follows or bool(config.modules_to_save and getattr(config, "ensure_weight_tying", False))


def _is_plain_lora(config: Any) -> bool:
    """Return whether merging touches weights alone, never a bias."""
    return str(getattr(config.peft_type, "value", config.peft_type)) == "LORA" and not config.lora_bias


def _like(parameter: str, on_disk: str, partner: str) -> str:
    """Return a parameter's name as the checkpoint spells it, which may drop or add a common prefix."""
    if partner.endswith(on_disk) and partner != on_disk:
        return parameter.removeprefix(partner.removesuffix(on_disk))
    return parameter


def _tied(base: Any) -> dict[str, str]:
    """Return embeddings and head by each other's name, where they are one tensor."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    paths = {id(module): path for path, module in base.named_modules()}
    one, other = f"{paths[id(head)]}.weight", f"{paths[id(embeddings)]}.weight"
    return {one: other, other: one}


def _heads_differ(tied: Mapping[str, str], names: Mapping[str, str], tensors: Mapping[str, Stored]) -> bool:
    """Return whether a base's files hold two different tensors where its configuration ties embeddings and head."""
    one, other = (tensors[names[parameter]] for parameter in tied)
    if one is other:
        return False
    return not torch.equal(one.read(), other.read())


def _require_mergeable(tuned: TunedModel) -> None:
    """Raise UserError for adapters that are no change of weights, or that belong to another base."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.peft_types import PeftType

    config = tuned.peft_config
    kind = str(config.get("peft_type"))
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[kind]) if kind in PeftType.__members__ else None
    if tuner is None or not issubclass(tuner, BaseTuner):
        raise UserError(
            f"{tuned.name}: an adapter of the kind {kind} (peft_type in adapter_config.json) cannot be merged: PEFT "
            + ("does not know it" if kind not in PeftType.__members__ else "keeps it beside the weights"),
            "serve it with PEFT on its base, or update peft if it is a newer kind",
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVES_THE_BASE):
        raise UserError(
            f"{tuned.name}: init_lora_weights = {start} changed the base's weights before training: the adapter "
            "belongs to weights that no file holds",
            "convert it in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _attached(base: Any, tuned: TunedModel, saved: Mapping[str, Stored]) -> Any:
    """Attach the adapter to the base without weights, and check that every tensor of its file is used."""
    _require_mergeable(tuned)
    with quiet():
        from peft import PeftModel
        from peft.utils import get_peft_model_state_dict

        held = read_header(tuned.weights)
        try:
            model = PeftModel.from_pretrained(base, str(tuned.adapter), low_cpu_mem_usage=True, torch_device="cpu")
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
            raise _does_not_fit(base, tuned, held, error) from None
        taken = set(get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False))
    left = sorted(held.keys() - taken - {stored.name for stored in saved.values()})
    empty = sorted(name for name, p in model.named_parameters() if p.is_meta and re.search(r"\.default\b", name))
    if left or empty:
        what = f"{len(left)} tensors of the adapter" if left else f"{len(empty)} tensors of the adapter are missing"
        raise UserError(
            f"{tuned.name}: {what} {'find no place in' if left else 'for'} a {type(base).__name__}: "
            + ", ".join((left or empty)[:3]),
            "name the base that the adapter was trained on with --base",
        )
    return model


def _saved_embeddings(base: Any, tuned: TunedModel) -> dict[str, Stored]:
    """Return the base's embeddings or head that PEFT saved beside an adapter on them, by parameter.

    Raises:
        UserError: They are of another number of tokens.
    """
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    paths = {f"{path}.weight": module.weight for path, module in base.named_modules() if module in ends}
    found = {}
    for name, stored in read_header(tuned.weights).items():
        parameter = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if parameter not in paths or "modules_to_save" in name:
            continue
        count, known = stored.shape[0], len(paths[parameter])
        if count != known:
            raise UserError(
                f"{tuned.name}: it brings {parameter} of {count} tokens, the base has {known}: its vocabulary was "
                "resized for the training",
                f"resize the base too (resize_token_embeddings({count}), save_pretrained) and name that with --base",
            )
        found[parameter] = stored
    return found


def _does_not_fit(base: Any, tuned: TunedModel, held: Iterable[str], error: Exception) -> UserError:
    found = re.search(r"copying a param with shape .*?\[(.*?)\].*?\[(.*?)\]", str(error))
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if found:
        reason = f"its matrices are [{found[1]}], this base needs [{found[2]}]"
    return UserError(
        f"{tuned.name}: the adapter does not fit a {type(base).__name__} ({tuned.model.base}): {reason}",
        "name the base that the adapter was trained on with --base",
    )


def adapter_bytes(folder: Path) -> int:
    """Return the bytes of an adapter's tensors."""
    return sum(stored.size for stored in read_header(folder / "adapter_model.safetensors").values())
