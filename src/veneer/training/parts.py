"""A run's parts, loaded with the cheapest to fail first: data, forecast, model, adapter.

Training and `veneer verify` begin with it. Nothing is written.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.config import Run, UserError
from veneer.config.sizes import parse_size
from veneer.config.task import LABELLED
from veneer.data.pipeline import Prepared, prepare
from veneer.data.render import Renderer
from veneer.engine.choose import UNSHARDED
from veneer.engine.placement import MemoryPlacement
from veneer.machine.device import Machine, bound_freed_memory, find_machine, release_memory, reset_peak
from veneer.machine.ranks import local_size
from veneer.model.adapters import from_error, from_rows
from veneer.model.adapters.from_error import start_from_error
from veneer.model.adapters.from_rows import start_from_rows
from veneer.model.attach import attach, detach
from veneer.model.classifier import attach_classifier, labels_of, load_classifier, make_renderer
from veneer.model.full import is_full, train_all
from veneer.model.load import load_model, load_tokenizer
from veneer.model.locate import BaseSource, locate
from veneer.model.new_tokens import add_rows, new_ids
from veneer.model.start import find_start, take_weights
from veneer.model.stored_weights import weights_by_path
from veneer.planning.predict import Prediction, PreparedData, predict_run
from veneer.planning.target import CONTEXT, least_budget, this_device
from veneer.training.choose_objective import choose_objective
from veneer.training.label_weights import weigh_labels

ON_HOST = "weights are in the host's memory, or spread over GPUs, and Transformers cannot generate answers from there"
ON_HOST_FIX = "leave evaluate.during out, or raise train.memory_budget, or " + UNSHARDED


@dataclass(frozen=True)
class RunParts:
    """A run's parts.

    Attributes:
        model: The base with its adapter: a fresh one, or that of `model.adapter`.
        start: folder of the adapter that training starts from; None: a fresh one.
        prediction: forecast of memory and time, with advice on the settings.
    """

    machine: Machine
    source: BaseSource
    tokenizer: Any
    renderer: Renderer
    data: Prepared
    prediction: Prediction
    model: Any
    start: Path | None


def load_parts(
    run: Run,
    force: bool = False,
    examine: Callable[[Prepared, Renderer], None] = lambda data, renderer: None,
    checkpoint: Path | None = None,
) -> RunParts:
    """Load a run's parts.

    Args:
        run: The settings.
        force: whether to load a run that is predicted not to fit.
        examine: function that gets the data and their renderer before the model is loaded, and may refuse them.
        checkpoint: folder of the checkpoint that the run goes on from; None: it begins.

    Raises:
        UserError: Anything the user can mend.
    """
    machine = find_machine()
    ranks, target = local_size(), this_device(machine, run.train.memory_budget)
    target = replace(target, ranks=ranks, host_bytes=target.host_bytes // ranks)
    if machine.device == "cpu":
        bound_freed_memory()
    source = locate(run.model)
    tokenizer = load_tokenizer(source, run.data)
    renderer = make_renderer(run, tokenizer)
    data = prepare(run.data, renderer, run.train.seed)
    choose_objective(run, data)
    if run.model.task in LABELLED:
        weigh_labels(run, data, labels_of(renderer))
    examine(data, renderer)
    start = find_start(run, source, renderer.template)
    prediction = predict_run(run, target, PreparedData(data, renderer))
    _require_positions(prediction.planner.base.shapes.positions, data)
    is_sharded = run.train.shard == "layers" and ranks > 1
    if is_sharded:
        _require_shardable(run, prediction)
    if not force:
        _require_memory(prediction)
        _require_host_memory(prediction.forecast.placement, target.host_bytes)
    to_host = _streams_weights(prediction) or is_sharded
    if run.evaluate.during and to_host and machine.device == "cuda":
        raise UserError(f"evaluate.during: {ON_HOST}", ON_HOST_FIX)
    begins = True if run.adapter is None else run.adapter.init_lora_weights
    if begins in (from_error.KIND, from_rows.KIND) and to_host and machine.device == "cuda":
        raise UserError(
            f"adapter.init_lora_weights = {begins}: weights are in the host's memory, where "
            "nothing can be computed from them before training",
            f"set it to true, or raise train.memory_budget, or {UNSHARDED}",
        )
    reset_peak(machine.device)
    if run.model.task != "causal-lm":
        assert run.adapter is not None, "find_start has refused it"
        classifier = load_classifier(source, run, labels_of(renderer), tokenizer.pad_token_id, machine)
        _require_embeddings(classifier.base, tokenizer, data)
        model = attach_classifier(
            classifier, run.adapter, run.model.task, run.train.seed, run.train.gradient_checkpointing is not False
        )
        model.peft_config["default"].base_model_name_or_path = source.reference
        return RunParts(machine, source, tokenizer, renderer, data, prediction, model, start)
    base = load_model(source, run.model, run.quantization, machine, to_host)
    if run.data.add_special_tokens is not None:
        add_rows(base, tokenizer, run.data.add_special_tokens)
    _require_embeddings(base, tokenizer, data)
    model = _adapted(base, run, source, start, tokenizer, data, checkpoint)
    return RunParts(machine, source, tokenizer, renderer, data, prediction, model, start)


def fresh_parts(parts: RunParts, run: Run) -> RunParts:
    """Return the parts of another run on the same base and rows: its forecast, and a fresh adapter.

    Args:
        parts: The parts that are loaded; their adapter is taken off the base, and they cannot be used any more.
        run: The settings, which differ from those of `parts` in the sections `adapter` and `train` alone.

    Raises:
        UserError: The run is predicted not to fit beside a base that stays on the device, or an entry of target_modules
            matches nothing.
    """
    start = find_start(run, parts.source, parts.renderer.template)
    was_trained = is_full(parts.model)
    base = parts.model if was_trained else detach(parts.model)
    parts = replace(parts, model=None)
    release_memory()
    reset_peak(parts.machine.device)
    prediction = predict_run(run, parts.prediction.planner.target, PreparedData(parts.data, parts.renderer))
    _require_memory(prediction)
    if _streams_weights(parts.prediction) or _streams_weights(prediction):
        raise UserError(
            f"the base does not fit {prediction.forecast.target.name} as a whole: its weights would be streamed, and "
            "such a base is loaded for a single run",
            "name a smaller model.base, set `quantization: {bits: 4}`, or train each run by itself",
        )
    if was_trained:  # the weights are not the base's any more
        del base
        release_memory()
        base = load_model(parts.source, run.model, run.quantization, parts.machine)
    model = _adapted(base, run, parts.source, start, parts.tokenizer, parts.data)
    return replace(parts, prediction=prediction, model=model, start=start)


def _adapted(
    base: Any,
    run: Run,
    source: BaseSource,
    start: Path | None,
    tokenizer: Any,
    data: Prepared,
    checkpoint: Path | None = None,
) -> Any:
    """Return a base with the run's adapter on it, or to be trained whole."""
    if run.adapter is None:
        return train_all(base, run.train.gradient_checkpointing is not False)
    added = run.data.add_special_tokens
    ids = new_ids(base, tokenizer, added) if added is not None else ()
    model = attach(base, run.adapter, run.train.seed, run.train.gradient_checkpointing is not False, ids)
    if run.adapter.init_lora_weights == from_rows.KIND:
        start_from_rows(model, data.train, checkpoint)
    elif run.adapter.init_lora_weights == from_error.KIND:
        # Also where a checkpoint follows: a reference is the adapter as it began.
        start_from_error(model, weights_by_path(source, base))
    if start is not None:
        take_weights(model, start, str(run.model.adapter))
    model.peft_config["default"].base_model_name_or_path = source.reference  # of checkpoints, too
    return model


def _streams_weights(prediction: Prediction) -> bool:
    """Return whether the run is predicted to stream frozen weights from the host's memory."""
    return any(block.streams for block in prediction.forecast.placement.blocks)


def _require_shardable(run: Run, prediction: Prediction) -> None:
    """Raise UserError for a run whose base cannot be spread over GPUs, before it is loaded."""
    base, forecast = prediction.planner.base, prediction.forecast
    if run.adapter is None:
        raise UserError("train.shard = layers: it is for frozen weights, and `adapter: none` trains all", UNSHARDED)
    if run.quantization is None and not base.is_4bit:
        raise UserError(
            "train.shard = layers: it spreads weights in 4 bits, and the base has others",
            f"set `quantization: {{bits: 4}}`, or {UNSHARDED}",
        )
    if forecast.engine != "fused":
        raise UserError(f"train.shard = layers: it takes the fused engine; {forecast.engine_reason}", UNSHARDED)


def _require_memory(prediction: Prediction) -> None:
    """Raises UserError for a run that cannot fit, before an hour is spent on loading it."""
    if prediction.cannot_fit:
        forecast, target = prediction.forecast, prediction.forecast.target
        phase = forecast.training_phase
        peak, budget = forecast.least_bytes, prediction.run.train.memory_budget
        least = least_budget(peak)
        if budget != "auto" and (parse_size(budget) or 0) < (parse_size(least) or 0):
            raise UserError(
                f"train.memory_budget = {budget}: the run needs at least {least}, {CONTEXT // 2**20} MiB of CUDA's own "
                "included, even with as little on the GPU as can be",
                f"set it to {least} or more; `veneer plan` says what else to change; --force tries it anyway",
            )
        raise UserError(
            f"the run does not fit: at its peak ({phase}) it needs {peak / 2**30:.1f} GiB, "
            f"{target.budget_bytes / 2**30:.1f} GiB are there, on {target.name}",
            "`veneer plan` says what to change; --force tries it anyway",
        )


def _require_host_memory(placement: MemoryPlacement, host_bytes: int) -> None:
    """Raise UserError if the host has not the memory for what leaves the GPU; it is pinned, so no swap can help."""
    if placement.host_bytes > host_bytes:
        raise UserError(
            f"the run keeps {placement.host_bytes / 2**30:.1f} GiB in the host's memory, of which "
            f"{host_bytes / 2**30:.1f} GiB can be pinned now",
            "end other programs, raise train.memory_budget so that less leaves the GPU, or lower data.max_length; "
            "`veneer plan` says what is where; --force tries it anyway",
        )


def _require_positions(positions: int | None, data: Prepared) -> None:
    """Raise UserError for rows longer than the model has positions; it would fail, or be silently wrong, there."""
    longest = int(max(part.lengths.max() for part in (data.train, data.validation) if len(part)))
    if positions is not None and longest > positions:
        raise UserError(
            f"the longest row has {longest} tokens, the model has positions for {positions}",
            f"set data.max_length to {positions} or less",
        )


def _require_embeddings(base: Any, tokenizer: Any, data: Prepared) -> None:
    """Raise UserError for a token beyond the model's embeddings, which ends a GPU's work without a message."""
    known = len(base.get_input_embeddings().weight)
    if len(tokenizer) <= known:
        return
    for part in (data.train, data.validation):
        for example in part:
            token = int(example.ids.max())
            if token >= known:
                raise UserError(
                    f"{example.place}: holds token {token} ({tokenizer.convert_ids_to_tokens(token)}), "
                    f"the model has embeddings for {known}",
                    "put the model's own tokenizer beside its weights, or give it more embeddings "
                    "(resize_token_embeddings) and save it with them",
                )
