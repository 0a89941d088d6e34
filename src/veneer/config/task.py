"""Refuses settings without an effect on a run's task: those of answers for a classifier, those of labels for others."""

from collections.abc import Mapping, Sequence

from veneer.config.adapter import Adapter
from veneer.config.errors import UserError
from veneer.config.run import Data, Evaluate, Model, Run, Train
from veneer.config.section import Section

# Settings of written answers, by section; a classifier has none.
OF_ANSWERS: dict[str, tuple[str, ...]] = {
    "data": (
        *("format", "packing", "chat_template", "template_date", "unrendered", "system_prompt", "loss_on"),
        *("rewritten_history", "text_by", "add_special_tokens"),
    ),
    "adapter": ("bias", "modules_to_save", "trainable_token_indices"),
    "train": ("objective", "reference", "dpo", "kto", "orpo", "simpo", "cpo"),
    "evaluate": ("metrics", "extract", "json_schema", "max_new_tokens", "during", "during_tokens", "equal_within"),
}
NOT_OF_PAIRS: dict[str, tuple[str, ...]] = {
    "data": ("packing", "loss_on", "add_special_tokens")
}  # rewards are of answers that a template renders
OF_LABELS = {"data": ("labels",), "train": ("class_weights",)}
OF_EMBEDDINGS = {"model": ("pooling",), "train": ("temperature",)}
SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "adapter": Adapter,
    "data": Data,
    "train": Train,
    "evaluate": Evaluate,
}
LABELLED = ("sequence-classification", "token-classification")  # tasks whose rows have labels


def require_settings(run: Run) -> None:
    """Raise UserError for a setting that has no effect on a run of its task."""
    is_causal = run.model.task == "causal-lm"
    if not is_causal:
        if run.adapter is None:
            raise UserError(
                f"adapter = none: all weights are trained of models that write text alone, and model.task = "
                f"{run.model.task}",
                "leave `adapter: none` out: an adapter is trained, and the head with it",
            )
        _require_default(run, OF_ANSWERS if run.model.task != "reward" else OF_ANSWERS | NOT_OF_PAIRS)
    if run.model.task not in LABELLED:
        _require_default(run, OF_LABELS, "sequence-classification")
    if run.model.task != "embedding":
        _require_default(run, OF_EMBEDDINGS, "embedding")
    if run.adapter is None or is_causal:
        return
    if run.train.engine == "fused":
        raise UserError(
            "train.engine = fused: it is made for decoders that write text; classifiers run on Transformers",
            "leave train.engine out",
        )
    if run.adapter.init_lora_weights not in (True, "gaussian"):
        raise UserError(
            f"adapter.init_lora_weights = {run.adapter.init_lora_weights}: a classifier begins with true or gaussian",
            "leave adapter.init_lora_weights out",
        )
    if run.model.adapter is not None:
        raise UserError(
            f"model.adapter = {run.model.adapter}: a classifier begins with a new adapter", "leave model.adapter out"
        )
    weights, labels = run.train.class_weights, run.data.labels
    if isinstance(weights, tuple) and (labels is None or len(labels) != len(weights)):
        raise UserError(
            f"train.class_weights: {len(weights)} numbers, and data.labels has {len(labels or ()) or 'none'}",
            "name the labels in data.labels, and a number for each of them in that order",
        )


def require_answers(model: Model, command: str) -> None:
    """Raise UserError where a command that is made for written answers is given a classifier."""
    if model.task != "causal-lm":
        raise UserError(
            f"{command}: it is made for models that write text, and this one "
            f"{'gives rewards' if model.task == 'reward' else 'classifies'} (model.task = {model.task})",
            "use `veneer predict`, `veneer evaluate` or `veneer merge`",
        )


def _require_default(run: Run, settings: Mapping[str, Sequence[str]], task: str = "") -> None:
    """Raise UserError for one of some settings that is not as it is by default; `task` is one that it acts on."""
    for section, names in settings.items():
        for name in names:
            value = getattr(getattr(run, section), name)
            if value != SECTIONS[section].model_fields[name].default:
                raise UserError(
                    f"{section}.{name} = {value}: has no effect with model.task = {run.model.task}",
                    f"leave {section}.{name} out" + (f", or set model.task={task}" if task else ""),
                )
