"""Loads a base with a head that classifies texts, and puts an adapter on it; the head is trained whole.

Modules that the base's files lack are random at first, and so is a head of a published encoder. All of these are saved
with the adapter (PEFT's `modules_to_save`): a head that is not comes back random from a reload, and answers by chance.
The head computes in float32 whatever the base's dtype, since it is trained itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from veneer.config import Adapter, Data, Model, Run, UserError
from veneer.config.task import LABELLED, require_settings
from veneer.data.labelled import LabelledRenderer, scan_labels
from veneer.data.render import Renderer
from veneer.data.rewarded import RewardRenderer
from veneer.data.tagging import TaggedRenderer, scan_tags
from veneer.data.texts import TextsRenderer
from veneer.machine.device import Machine
from veneer.model.adapters import find_method
from veneer.model.head_tasks import HEAD_TASKS
from veneer.model.load import freeze, loading, settings_of
from veneer.model.locate import BaseSource
from veneer.model.quiet import quiet
from veneer.model.shapes import Shapes, find_config, shapes_of

FIX = "name an encoder (BERT, RoBERTa, DistilBERT, ModernBERT, DeBERTa) or a decoder such as Llama or Qwen"


class Classifier(NamedTuple):
    """A base with a head.

    Attributes:
        base: Transformers' model, frozen.
        head: paths of the modules that are trained whole.
    """

    base: Any
    head: list[str]


def make_renderer(run: Run, tokenizer: Any) -> Renderer:
    """Return what makes examples of a run's rows, by `model.task`."""
    require_settings(run)
    if run.model.task == "causal-lm":
        return Renderer(tokenizer, run.data)
    config = find_config(run.model)
    if run.model.task == "reward":
        if has_head(config, "reward") and len(config.id2label) != 1:
            raise UserError(
                f"model.base = {run.model.base}: its head has {len(config.id2label)} labels, a reward is one number",
                "name a base without a head",
            )
        return RewardRenderer(tokenizer, run.data)
    labels = find_labels(run, config) if run.model.task in LABELLED else ()
    return renderer_of(run.model.task, tokenizer, run.data, labels)


def renderer_of(task: str, tokenizer: Any, data: Data, labels: Sequence[str]) -> LabelledRenderer:
    """Return what makes examples of rows with these labels; embeddings have none."""
    if task == "embedding":
        return TextsRenderer(tokenizer, data)
    return (TaggedRenderer if task == "token-classification" else LabelledRenderer)(tokenizer, data, labels)


def labels_of(renderer: Renderer) -> tuple[str, ...]:
    """Return the labels of a run that classifies; `reward` of one that gives rewards, none of embeddings."""
    return renderer.labels


def find_labels(run: Run, config: Any) -> tuple[str, ...]:
    """Return the names of a run's labels: those of `data.labels`, of the base's own head, or of its rows.

    Raises:
        UserError: there are fewer than two, or another number than the base's head has.
    """
    is_headed = has_head(config, run.model.task)
    scan = scan_tags if run.model.task == "token-classification" else scan_labels
    named = [config.id2label[number] for number in sorted(config.id2label)] if is_headed else []
    is_named = bool(named) and named != [f"LABEL_{number}" for number in range(len(named))]
    labels = run.data.labels or (tuple(named) if is_named else scan(run.data))
    where = "data.labels" if run.data.labels else f"data.train = {run.data.train}"
    if len(labels) < 2:
        what = f"all rows have one label, `{labels[0]}`" if labels else "no row has a label"
        raise UserError(
            f"{where}: {what}", "name rows with at least two labels; data.columns={label: ...} says which column it is"
        )
    if len(set(labels)) < len(labels):
        raise UserError(f"data.labels = {', '.join(labels)}: a name stands there twice", "name each label once")
    if is_headed and len(labels) != len(named):
        raise UserError(
            f"{where}: {len(labels)} labels ({', '.join(labels[:6])}), and the head of model.base = {run.model.base} "
            f"has {len(named)}",
            "name its labels in data.labels, in its order, or a base without a head",
        )
    return labels


def has_head(config: Any, task: str) -> bool:
    """Return whether a base's files have a head of a task."""
    return any(name.endswith(HEAD_TASKS[task].ending) for name in getattr(config, "architectures", None) or ())


def load_classifier(
    source: BaseSource, run: Run, labels: Sequence[str], pad_token_id: int | None, machine: Machine
) -> Classifier:
    """Load the base with a head to the machine's device, frozen; weights that its files lack are drawn by `train.seed`.

    Raises:
        UserError: it has no such head, cannot be loaded, or its files lack weights that are not the head's.
    """
    config = find_config(run.model)
    require_classifies(config, source.name, run.model.task)
    torch.manual_seed(run.train.seed)
    base, missing = read_classifier(
        source, classifier_settings(run, config, labels, pad_token_id, machine), run.model.task
    )
    head = head_of(base, run.model.task)
    unused = tuple(f"{path}." for path in (*head, *poolers_of(base)))
    lacking = [key for key in missing if not key.startswith(unused)]
    if lacking:
        raise UserError(
            f"model.base = {source.name}: its files lack {len(lacking)} weights that are not the head's "
            f"({', '.join(lacking[:3])}, ...); they would be random",
            "name a complete model",
        )
    freeze(base)
    return Classifier(base, head)


def classifier_settings(
    run: Run, config: Any, labels: Sequence[str], pad_token_id: int | None, machine: Machine
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a base with a head, except the location."""
    settings = settings_of(run.model, run.quantization, machine) | config_settings(labels, pad_token_id)
    if run.quantization is not None:
        settings["quantization_config"].llm_int8_skip_modules = head_of(
            build_classifier(config, len(labels), run.model.task), run.model.task
        )
    return settings


def read_classifier(source: BaseSource, settings: dict[str, Any], task: str) -> tuple[Any, list[str]]:
    """Load a base with a head by Transformers alone; return it and the names of weights that its files lack.

    Raises:
        UserError: it cannot be loaded.
    """
    with loading(source, "model"):
        base, report = HEAD_TASKS[task].auto_class.from_pretrained(
            source.location,
            revision=source.revision,
            local_files_only=source.only_local,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            **settings,
        )
    return base, sorted(report["missing_keys"])


def config_settings(labels: Sequence[str], pad_token_id: int | None) -> dict[str, Any]:
    """Return what plain Transformers is to be given to build the same head; decoders find a text's end by padding."""
    found: dict[str, Any] = (
        {}
        if not labels
        else {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: n for n, name in enumerate(labels)},
        }
    )
    return found if pad_token_id is None else found | {"pad_token_id": pad_token_id}


def require_classifies(config: Any, name: str, task: str) -> None:
    """Raise UserError for an architecture that Transformers has no head of classes for."""
    if not HEAD_TASKS[task].takes(config):
        what = task.replace("-", " ")
        raise UserError(f"model.base = {name}: Transformers has no head for {what} on {config.model_type}", FIX)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model.base = {name}: {config.model_type} is an encoder with a decoder", FIX)


def build_classifier(config: Any, labels: int, task: str) -> Any:
    """Build a base with a head on the meta device."""
    if labels:
        names = [str(number) for number in range(labels)]
        named = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
        config = type(config).from_dict(config.to_dict() | named)
    with quiet(), torch.device("meta"):
        base = HEAD_TASKS[task].auto_class.from_config(config, trust_remote_code=False)
    base.config.use_cache = False  # as of one that is loaded
    return base


def head_of(base: Any, task: str) -> list[str]:
    """Return paths of the modules that are trained whole: those beside the backbone, and its pooler.

    Embeddings have no head.
    """
    if task == "embedding":
        return []
    beside = [
        name
        for name, module in base.named_children()
        if name != base.base_model_prefix and any(True for _ in module.parameters())
    ]
    return beside + poolers_of(base)


def poolers_of(base: Any) -> list[str]:
    """Return paths of modules that compute an output of a whole text, which embeddings do not use."""
    return [path for path, _ in base.named_modules() if path.rpartition(".")[2] == "pooler"]


def classifier_shapes(base: Any, head: Sequence[str]) -> Shapes:
    """Return the shapes of a base with a head, whose modules no adapter is put on."""
    shapes = shapes_of(base)
    aside = (*head, *poolers_of(base))
    inside = {path for path in shapes.linears if path in aside or path.startswith(tuple(f"{name}." for name in aside))}
    embedded = next((m for path, m in base.named_modules() if path.endswith(".position_embeddings")), None)
    positions, padding = shapes.positions, getattr(embedded, "padding_idx", None)
    if positions is not None and padding is not None:  # RoBERTa numbers its positions from behind the padding's
        positions -= padding + 1
    return replace(shapes, beside=shapes.beside | inside, positions=positions)


def classifier_positions(model: Model, labels: int) -> int | None:
    """Return the most tokens that a classifier can read; None: no limit is known."""
    base = build_classifier(find_config(model), labels, model.task)
    return classifier_shapes(base, head_of(base, model.task)).positions


def attach_classifier(
    classifier: Classifier, adapter: Adapter, task: str, seed: int, gradient_checkpointing: bool
) -> Any:
    """Put a new adapter on a base with a head, in place; return PEFT's wrapper around it.

    Raises:
        UserError: an entry of target_modules matches nothing.
    """
    with quiet():
        from peft import get_peft_model

        targets = classifier_shapes(*classifier).targets(adapter)
        config = find_method(adapter).configure(adapter, sorted(targets))
        config.task_type, config.modules_to_save = HEAD_TASKS[task].task_type, list(classifier.head) or None
        torch.manual_seed(seed)
        model = get_peft_model(classifier.base, config)
        config.modules_to_save = (
            list(classifier.head) or None
        )  # PEFT adds the usual names of heads, each time that it loads
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for path in classifier.head:
        trained = classifier.base.get_submodule(path).modules_to_save["default"].float()
        trained.register_forward_pre_hook(_in_float32)
    return model


def _in_float32(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.float() if torch.is_tensor(part) and part.is_floating_point() else part for part in given)
