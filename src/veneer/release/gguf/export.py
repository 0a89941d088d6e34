"""Export to GGUF for llama.cpp and Ollama: the merged model in one file, or the adapter alone.

Tensors go from the base's safetensors through the adapter, in float32, straight into the type of the file: no merged
folder in between, one rounding, one tensor in memory at a time. The file carries the tokenizer, the chat template and
the stop tokens of the training, so that what runs it needs nothing else. A Modelfile for Ollama always lies beside it.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from veneer.config import UserError
from veneer.config.folder import whole_folder, write_text
from veneer.model.adapters import find_method
from veneer.model.lineage import gguf_origin
from veneer.model.passport import base_name
from veneer.model.tuned import TunedModel
from veneer.release.gguf.importance import Importance, importance_of, write_importance
from veneer.release.gguf.modelfile import modelfile
from veneer.release.gguf.tensor_layout import COMPUTED, TensorLayout
from veneer.release.gguf.tokenizer import vocabulary
from veneer.release.gguf.types import QUANTS, Mix, encoded, require_quant, size_of
from veneer.release.merge.adapter_delta import AdapterDelta
from veneer.release.merge.plan import MergePlan, require_any_bits, resolved_base
from veneer.release.merge.stored_4bit import base_weights
from veneer.release.output import require_free, require_space
from veneer.release.publish.card import hub_id, licence
from veneer.release.publish.vllm_lint import vllm_lint
from veneer.release.weights import Stored, read_header

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    out: str
    file: str
    quant: str
    on: str
    tensors: int
    bytes: int
    types: dict[str, int]
    warnings: tuple[str, ...]
    choice: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _GgufTensor:
    """A tensor of the file, and the function that makes its value."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], torch.Tensor]
    importance: torch.Tensor | None = None


def export_model(
    tuned: TunedModel,
    out: Path,
    quant: str = "q8_0",
    on: str = "trained",
    on_done: Progress = lambda done: None,
    importance: Importance | None = None,
) -> Exported:
    """Write base and adapter as one GGUF file, with a Modelfile, into a new folder.

    Args:
        tuned: The adapter and its base.
        out: The folder; it appears whole or not at all.
        quant: Type of the weights; see `types.QUANTS`.
        on: Base to merge into: trained, base or nf4.
        on_done: Callback that gets the number of bytes just written.
        importance: Importance of each weight's input columns, by its name; for types of 2 to 6 bits.

    Raises:
        UserError: The architecture, the tokenizer or the type cannot be exported, or as for a merge.
    """
    require_quant(quant)
    on = resolved_base(tuned, on)
    require_free(out)
    layout = TensorLayout(tuned.config, tuned.model.base)
    tensors = base_weights(tuned)
    delta = AdapterDelta(tuned, tensors)
    merge_plan = MergePlan(tuned, delta, on)
    every = tensors | delta.untied
    tied = not delta.unties and bool(getattr(layout.config, "tie_word_embeddings", False))
    if delta.unties and layout.format.always_ties:
        raise UserError(
            f"{tuned.name}: {layout.family.title} with an untied head, which llama.cpp does not support",
            "serve the folder that `veneer merge` writes",
        )
    mix = Mix(quant, layout.depth, layout.heads // layout.kv_heads, tied)
    planned = [
        _plan(layout, merge_plan, mix, name, stored, importance_of(importance or {}, delta, name))
        for name, stored in every.items()
        if stored.is_float and not name.endswith(COMPUTED) and not (tied and name.endswith("lm_head.weight"))
    ]
    extras = layout.extra_tensors()
    planned += [_GgufTensor(name, tuple(value.shape), "F32", _constant(value)) for name, value in extras.items()]
    rows = every[delta.name_on_disk(delta.embeddings)].shape[0]
    file = f"{_title(tuned)}-{quant}.gguf"
    require_space(out, sum(size_of(tensor.kind, tensor.shape) for tensor in planned))
    with whole_folder(out) as unfinished:
        writer = _writer(unfinished / file, layout.format.arch)
        _describe(writer, tuned, layout, quant)
        writer.add_string("veneer.on", on)
        writer.add_bool("veneer.importance", importance is not None)
        _add_tokenizer(writer, tuned, rows)
        _write_tensors(writer, planned, on_done)
        _write_modelfile(tuned, unfinished, file, None)
        if importance is not None:
            write_importance(unfinished, importance)
        size = (unfinished / file).stat().st_size
    types: dict[str, int] = {}
    for tensor in planned:
        types[tensor.kind] = types.get(tensor.kind, 0) + 1
    warnings = (*layout.warnings, *_warnings(tuned, quant, on, importance is not None))
    return Exported(str(out), file, quant, on, len(planned), size, types, warnings)


def export_adapter(tuned: TunedModel, out: Path, on_done: Progress = lambda done: None) -> Exported:
    """Write the adapter alone as a GGUF LoRA, to be put on a GGUF file of its base (`llama-server --lora`).

    Raises:
        UserError: The adapter is more than LoRA matrices on linear layers, which is all that llama.cpp knows.
    """
    require_free(out)
    if tuned.is_full:
        raise UserError(f"{tuned.name}: all weights were trained, so it has no adapter", "leave --adapter-only out")
    layout = TensorLayout(tuned.config, tuned.model.base)
    refused = [check.detail for check in vllm_lint(tuned.adapter) if not check.passed and check.id != "rank"]
    if refused:
        raise UserError(
            f"{tuned.name}: llama.cpp takes LoRA matrices only on linear layers: {'; '.join(refused)}",
            "export the merged model: leave --adapter-only out",
        )
    require_any_bits(tuned, "--adapter-only")
    AdapterDelta(tuned, base_weights(tuned))  # it belongs to this base
    config = tuned.peft_config
    held = read_header(tuned.weights)
    planned = [_plan_lora(layout, name, stored) for name, stored in held.items()]
    options = SimpleNamespace(**config)
    alpha = find_method(options).scale(options) * config["r"]
    file = f"{_title(tuned)}-lora.gguf"
    require_space(out, sum(size_of(tensor.kind, tensor.shape) for tensor in planned))
    with whole_folder(out) as unfinished:
        writer = _writer(unfinished / file, layout.format.arch)
        writer.add_type("adapter")
        writer.add_name(_title(tuned))
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        _write_tensors(writer, planned, on_done)
        _write_modelfile(tuned, unfinished, file, _base_of_lora(tuned))
        size = (unfinished / file).stat().st_size
    return Exported(str(out), file, "f32", "base", len(planned), size, {"F32": len(planned)}, ())


def _plan(
    layout: TensorLayout, merge_plan: MergePlan, mix: Mix, name: str, stored: Stored, importance: torch.Tensor | None
) -> _GgufTensor:
    there = layout.name(name)
    transform = layout.transform(name)

    def make() -> torch.Tensor:
        value = merge_plan.value(name, stored)
        return value if transform is None else transform(value)

    return _GgufTensor(there, stored.shape, mix.type_of(there, stored.shape), make, importance)


def _plan_lora(layout: TensorLayout, name: str, stored: Stored) -> _GgufTensor:
    """Plan a LoRA matrix; B has the rows of its weight and the same layout."""
    module, _, half = name.removeprefix("base_model.model.").rpartition(".lora_")
    weight = f"{module}.weight"
    transform = layout.transform(weight) if half.startswith("B") else None

    def make() -> torch.Tensor:
        value = stored.read()
        return value if transform is None else transform(value)

    return _GgufTensor(f"{layout.name(weight)}.lora_{half[0].lower()}", stored.shape, "F32", make)


def _constant(value: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: value


def _writer(path: Path, arch: str) -> Any:
    from gguf import GGUFWriter

    return GGUFWriter(path, arch)


def _describe(writer: Any, tuned: TunedModel, layout: TensorLayout, quant: str) -> None:
    """Add all metadata but that of the tokenizer."""
    writer.add_type("model")
    writer.add_name(_named(_title(tuned), tuned.renderer.tokenizer))
    if (stated := licence(tuned.source)) is not None:
        writer.add_license(stated)
    if (known := hub_id(tuned.source)) is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, known.partition("/")[2])
        writer.add_base_model_organization(0, known.partition("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{known}")
    elif (file := gguf_origin(tuned.model)) is not None:
        # The file itself, not the model that it was made from: other weights.
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, Path(file.file).stem)
        writer.add_base_model_description(0, f"{file.describe()}, dequantized; {file.caution()}".rstrip("; "))
        if file.package is not None:
            writer.add_base_model_url(0, "https://pypi.org/project/" + file.package.replace("==", "/"))
    writer.add_file_type(QUANTS[quant][0])
    writer.add_quantization_version(2)
    for key, value in layout.metadata().items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        (writer.add_string if isinstance(value, str) else add)(key, value)


def _named(title: str, tokenizer: Any) -> str:
    """Return the model's name in the file. llama.cpp strips spaces after control tokens, as Phi-3's tokenizer does,
    only if the name contains "phi-3"; it then expects the tokens of that tokenizer.
    """
    strips = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if strips and {"<s>", "</s>", "<unk>", "<|endoftext|>"} <= tokenizer.get_vocab().keys():
        return title if "phi-3" in title.lower() else f"{title} (Phi-3)"
    return re.sub(r"(?i)phi-?3", "phi 3", title)


def _add_tokenizer(writer: Any, tuned: TunedModel, rows: int) -> None:
    renderer = tuned.renderer
    found = vocabulary(renderer.tokenizer, rows, tuned.stop_ids)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    for name, number in found.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, flag in found.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    if renderer.template is not None:
        writer.add_chat_template(renderer.template)


def _write_tensors(writer: Any, planned: list[_GgufTensor], on_done: Progress) -> None:
    """Write all tensors, making each when its turn comes."""
    from gguf import GGMLQuantizationType

    for tensor in planned:
        size = size_of(tensor.kind, tensor.shape)
        kind = GGMLQuantizationType[tensor.kind]
        plain = {"F32": np.float32, "F16": np.float16}.get(tensor.kind)
        shape = tensor.shape if plain else (*tensor.shape[:-1], size // int(np.prod(tensor.shape[:-1])))
        writer.add_tensor_info(tensor.name, shape, np.dtype(plain or np.uint8), size, raw_dtype=None if plain else kind)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for tensor in planned:
            for piece in encoded(tensor.make(), tensor.kind, tensor.name, tensor.importance):
                file.write(piece.data)
            size = size_of(tensor.kind, tensor.shape)
            writer.write_padding(file, size)
            on_done(size)


def _write_modelfile(tuned: TunedModel, folder: Path, file: str, adapter_of: str | None) -> None:
    renderer = tuned.renderer
    ids = tuned.stop_ids
    stops = [str(renderer.tokenizer.convert_ids_to_tokens(number)) for number in ids]
    write_text(folder / "Modelfile", modelfile(file, renderer, stops, adapter_of))


def _base_of_lora(tuned: TunedModel) -> str:
    """Return what a Modelfile names as an adapter's base: a hub id, or the name of the base's file beside it."""
    if (known := hub_id(tuned.source)) is not None:
        return known
    file = gguf_origin(tuned.model)
    return f"./{file.file if file is not None else base_name(tuned.source)}"


def _title(tuned: TunedModel) -> str:
    path = Path(tuned.name).expanduser().resolve()
    return path.parent.name if path.name in ("adapter", "model") else path.name


def _warnings(tuned: TunedModel, quant: str, on: str, has_importance: bool) -> Iterator[str]:
    kind = None if tuned.quantization is None else tuned.quantization.quant_type
    if QUANTS[quant][2] >= 7 or kind is None:
        return
    better = "--quant q8_0 keeps the trained model almost as it is"
    if not has_importance:
        better += "; an importance matrix of the run's rows (--imatrix) loses less"
    if on == "nf4":
        yield f"the weights are quantized twice, to {kind} in training and to {quant} here; {better}"
    else:
        yield (
            f"the adapter was trained and judged on {kind} weights and will run on {quant} ones, whose errors are "
            f"others; {better}"
        )
