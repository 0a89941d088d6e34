"""The loop makes optimizer steps, logs them, evaluates held-out rows, writes checkpoints and stops cleanly.

A step's loss is summed over its trained tokens and divided by their number, over all its micro-batches together, so
that how a step is cut does not change it. Two things are checked that otherwise go wrong in silence: after the first
step every LoRA B matrix must have a finite gradient that is not zero, and no loss may ever be NaN or infinite.

Passes that run out of memory are dropped and run again with less (memory.py). The update comes after all of them and
allocates nothing, so that no parameter is ever updated twice, or without the others.

A step waits for the device once, after all of it has been launched: loss, norm and checks come back in one reading. A
number that is not finite has spoiled the adapter in memory then, and ends the run before anything is written.

Gradients of float16 runs are scaled against underflow as usual (torch's GradScaler); other runs are not.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from veneer.config import Interrupted, JobError, Train, UserError
from veneer.config.notify import notify
from veneer.data.batch import Batch, Batches, Example
from veneer.engine.interface import Engine
from veneer.engine.objective import Objective, StepOutput, TrainedTokens
from veneer.machine.batching import Batching
from veneer.machine.device import peak_bytes, rng_state, set_rng_state
from veneer.machine.ranks import ALONE, Ranks
from veneer.model.adapters import find_method
from veneer.model.adapters.from_base import drop_frozen_gradients, starts_from_base
from veneer.model.full import is_full
from veneer.training import checkpoint
from veneer.training.best import BestStep
from veneer.training.full_optimizer import FullOptimizer, ReleasedGradients
from veneer.training.held_out import HeldOutRows
from veneer.training.layer_norms import LayerNorms
from veneer.training.memory import OutOfMemoryRecovery, describe
from veneer.training.metrics import Listener
from veneer.training.optimizer import allocate_states, optimizer_of, parameters_to_update
from veneer.training.pair_values import describe_pairs, outputs_of_rows
from veneer.training.parallel import StepExchange, spread_rows
from veneer.training.reference_logprobs import WithReference
from veneer.training.saving import Saver
from veneer.training.schedule import learning_rate
from veneer.training.stop import stop_signal

# Measures metrics beside the held-out loss, without a trace in the training; gets a function that says whether a stop
# was asked for, and then returns None.
MeasureDuring = Callable[[Callable[[], bool]], dict[str, float] | None]
# Estimates the KL divergence from the reference over a step's rows, or the held-out rows (None); by its name.
EstimateKL = Callable[[int | None], dict[str, float]]


class Loop:
    """Trains an adapter, or all weights of a model.

    Args:
        model: The PEFT model whose adapter is trained, or the model that is trained whole.
        engine: Engine that computes log-probabilities and gradients.
        objective: Objective to minimize.
        batches: The training data.
        held_out: Rows for the held-out loss; may be empty.
        rows_at_a_time: Number of them that are computed together.
        train: The settings.
        checkpoints: Folder of the run's checkpoints.
        began_with: Hashes of base and data, kept in checkpoints and compared when one is resumed.
        device: Device of the model.
        predicted_peak_bytes: Predicted peak of training, logged beside the measured one.
        explain: Function that says what to change where a single row does not fit; see `memory.need_and_fix`.
        most_tokens: Tokens of a micro-batch beyond which it is cut in two, as memory demands; None: none is.
        scale_loss: Whether gradients need scaling (float16).
        during: Function that measures the metrics of `evaluate.during`.
        better: Better values of the metric by which the best step is found: lower or higher.
        with_reference: Function that gives a batch the reference's log-probabilities; see `reference_logprobs`.
        estimate_kl: Function that estimates the KL divergence, for objectives that need it.
        releases: Whether each weight is updated within the backward (`FullOptimizer.released`).
        ranks: This process among those of the run, to which `batches` deals its steps.
    """

    def __init__(
        self,
        model: Any,
        engine: Engine,
        objective: Objective,
        batches: Batches,
        held_out: HeldOutRows,
        rows_at_a_time: int,
        train: Train,
        checkpoints: Path,
        began_with: Mapping[str, str | None],
        device: str,
        predicted_peak_bytes: int,
        explain: Callable[[], str],
        most_tokens: int | None = None,
        scale_loss: bool = False,
        during: MeasureDuring = lambda stopped: {},
        better: str = "lower",
        with_reference: WithReference = lambda batch: batch,
        estimate_kl: EstimateKL = lambda step: {},
        releases: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._exchange = StepExchange(ranks, batches, train.seed)
        self._objective = objective
        self._batches = batches
        self._held_out = held_out
        self._held_out_batching = held_out_batching(rows_at_a_time, objective)
        self._train = train
        self._checkpoints = checkpoints
        self._device = device
        self._predicted_peak_bytes = predicted_peak_bytes
        self._learn_first = learn_first(model)
        self._updated = parameters_to_update(model, engine, train, device)
        self._optimizer = optimizer_of(model, self._updated, train, device)
        self._releases = releases
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._layer_norms = LayerNorms(trained, engine.master)
        self._scaler = torch.amp.GradScaler(device, enabled=scale_loss)
        self._state = checkpoint.TrainingState(model, self._optimizer, self._updated, self._scaler, began_with)
        self._saver = Saver(checkpoints, train.save_total_limit, ranks)
        self._recovery = OutOfMemoryRecovery(engine, self._drop_gradients, explain, most_tokens)
        self._explain = explain
        self._during = during
        self._with_reference = with_reference
        self._estimate_kl = estimate_kl
        self._model = model
        self.best = BestStep(train.early_stopping, better)
        self.steps = batches.steps(train.num_train_epochs, train.max_steps)
        self.done = 0
        self.loss: float | None = None  # of the last step that was made here
        self.was_stopped = False  # a stop was asked for during the last step, which had nothing left to stop
        self._has_gradients = False
        self._held_out_values: dict[str, float] | None = None

    def resume(self, path: Path) -> None:
        """Restore a checkpoint of this run."""
        self.done = checkpoint.load(path, self._state)

    def recall(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take the evaluations before a resumed run into account.

        Raises:
            UserError: The checkpoint of the best step is gone.
        """
        self.best.recall(records)
        if self._protected is not None and not (best := self._checkpoint(self._protected)).exists():
            raise UserError(
                f"{best}: is gone, and train.keep=best would deliver it",
                "restore it, or start a new run in another train.output_dir",
            )

    def run(self, listeners: Sequence[Listener], try_largest: bool = False, until: int | None = None) -> float:
        """Train to the end, to the step `until`, or until `train.early_stopping` ends it.

        Returns the mean of all steps' tokens per second.

        A checkpoint comes before the evaluation of its step, which a resumed run makes again: an evaluation may take
        longer than whoever stops the run waits for it.

        Args:
            listeners: Callbacks that get each record of metrics.jsonl.
            try_largest: Whether to run the largest micro-batch first, so that a run that does not fit ends at once.
            until: Step at which to stop with a checkpoint, from which the run can go on; None: the last one.

        Raises:
            JobError: The loss of a step is not finite, an adapter gets no gradient, or a row does not fit into memory.
            Interrupted: The user stopped the run; a checkpoint was written.
        """
        train = self._train
        tokens, seconds = 0, 0.0
        last = self.steps if until is None else min(until, self.steps)
        try:
            with stop_signal() as asked, self._saver:
                stopped = self._exchange.agreed(asked)
                if try_largest and self.done < last:
                    self._try_largest()
                if self.done:
                    self._evaluate_if_due(listeners, stopped)
                while self.done < last and not self.best.is_over:
                    self._saver.check()
                    record = self._step(self.done)
                    record["peak_bytes"] = self._exchange.agree(record["peak_bytes"])
                    self.done += 1
                    self.loss = record["loss"]
                    tokens, seconds = tokens + record["tokens"], seconds + record["seconds"]
                    is_last = self.done == last
                    if self.done % train.logging_steps == 0 or is_last:
                        _report(listeners, record)
                    if is_last or stopped() or _due(self.done, train.save_steps):
                        self._save()
                    if stopped() and not is_last:
                        raise Interrupted(self._checkpoint())
                    self._evaluate_if_due(listeners, stopped)
                self.was_stopped = stopped()
                if self.done == self.steps or self.best.is_over:
                    self._finish()
        except torch.OutOfMemoryError as error:
            shortage = describe(error)  # beside a step's passes, where nothing can be made smaller
        else:
            return round(tokens / seconds, 1) if seconds else 0.0
        raise JobError(f"out of memory after step {self.done} ({shortage}): {self._explain()}")

    def _finish(self) -> None:
        """Say where training ended before its last step, and restore the adapter of the best step to be delivered."""
        best, train = self.best, self._train
        if self.done < self.steps:
            if not self._saver.has(self.done):
                self._save()
            rate = learning_rate(self.done - 1, self.steps, 1.0, train.warmup_ratio, train.lr_scheduler_type)
            found = "" if best.step is None else f", best after step {best.step} ({best.value:.4g})"
            waited = f"{best.waited} evaluation{'s' if best.waited > 1 else ''}"
            notify(
                f"training ends early, after step {self.done} of {self.steps}: {waited} without a better {best.metric}"
                f"{found}; the learning rate follows the schedule of all steps, and is at {rate:.0%} of its peak",
                "info",
                "train.early_stopping",
            )
        if self.kept_step != self.done and self._ranks.is_first:
            self._saver.wait()
            checkpoint.load_adapter_alone(self._checkpoint(self.kept_step), self._model)

    @property
    def kept_step(self) -> int:
        """The step whose adapter is delivered."""
        return self.best.kept_step(self._train.keep, self.done)

    @property
    def _protected(self) -> int | None:
        """The step whose checkpoint is never deleted; None: there is no such step."""
        return self.best.step if self._train.keep == "best" else None

    def train_briefly(self) -> None:
        """Make all steps with no record, no checkpoint and no held-out loss, as a trial of settings needs none.

        Raises:
            JobError: See `run`.
        """
        for number in range(self.steps):
            self._step(number)

    def _try_largest(self) -> None:
        """Run the largest micro-batch forward and backward; it changes nothing but what fits."""
        began_with, scale = rng_state(), self._loss_scale()
        what = f"the largest micro-batch, tried before step {self.done + 1},"
        largest = self._batches.largest()
        values = self._objective.step_values(largest)
        largest = [batch.with_values(values) for batch in largest]
        if self._releases:
            with self._released(ReleasedGradients(updates=False)):
                self._passes(largest, scale)
        else:
            self._recovery.run(what, largest, lambda batches: self._passes(batches, scale))
        self._drop_gradients()
        set_rng_state(began_with)

    def _released(self, gradients: ReleasedGradients) -> AbstractContextManager[None]:
        assert isinstance(self._optimizer, FullOptimizer)
        return self._optimizer.released(gradients)

    def _passes(self, batches: Iterable[Batch], scale: float) -> dict[str, torch.Tensor]:
        """Add gradients of micro-batches, times the scale, to those that are there; returns the sums over all."""
        allocate_states(self._optimizer)  # before the passes, so that they have what is left from the first step on
        complete, objective = self._with_reference, self._objective
        batches = objective.begin_step(self._engine, batches)
        return _sums([self._engine.forward_backward(complete(batch).scaled(scale), objective) for batch in batches])

    def _gradients(
        self, number: int, batches: Sequence[Batch], scale: float
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        """Compute a step's gradients, over all ranks, ready for the update.

        Args:
            number: Steps done before.
            batches: Micro-batches of this rank.
            scale: Factor of the loss.

        Returns:
            Sums over all micro-batches; the norm before clipping; the largest magnitude in the gradient of each matrix
            that learns first, until they have been checked.
        """
        if self._releases:  # weights are updated on the way, so that nothing can be computed again
            gradients = ReleasedGradients()
            with self._released(gradients):
                sums = self._passes(batches, scale)
            sizes = [] if self._has_gradients else [*map(gradients.largest, self._learn_first.values())]
            return sums, gradients.norm(), sizes
        what = f"step {number + 1}"
        if self._ranks.size == 1:
            return self._recovery.run(what, batches, lambda batches: self._normed(self._passes(batches, scale)))
        sums = self._recovery.run(what, batches, lambda batches: self._passes(batches, scale))
        if not scale:  # the batch is another rank's
            sums = {name: torch.zeros_like(value) for name, value in sums.items()}
        self._exchange.meet(number)
        self._exchange.add(self._updated.values(), [*sums.values()])
        return self._normed(sums)

    def _normed(
        self, sums: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        """Clip the gradients; returns what `_gradients` does."""
        if not is_full(self._model) and starts_from_base(self._model.peft_config["default"]):
            drop_frozen_gradients(self._model)
        self._scaler.unscale_(self._optimizer)
        is_logged = _due(self.done + 1, self._train.logging_steps) or self.done + 1 == self.steps
        self._layer_norms.measure(is_logged)
        norm = torch.nn.utils.clip_grad_norm_(self._updated.values(), self._train.max_grad_norm or math.inf)
        largest = [] if self._has_gradients else [_largest(parameter.grad) for parameter in self._learn_first.values()]
        return sums, norm, largest

    def _loss_scale(self) -> float:
        """Return the factor of the loss that keeps gradients of float16 from underflow; 1 for other runs."""
        # Only a scaler that is used lives on the device.
        return self._scaler.scale(torch.ones((), device=self._device)).item() if self._scaler.is_enabled() else 1.0

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        if self._scaler.is_enabled():
            self._scaler.update(self._scaler.get_scale())  # the same scale; forgets that gradients were unscaled

    def _step(self, number: int) -> dict[str, Any]:
        started = time.perf_counter()
        train = self._train
        assert train.learning_rate != "auto", "it is found before the loop is made"
        rate = learning_rate(number, self.steps, train.learning_rate, train.warmup_ratio, train.lr_scheduler_type)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_ratio", 1.0)
        micro_batches, own = self._exchange.step(number)
        values = self._objective.step_values(micro_batches) | self._estimate_kl(number)
        micro_batches = [batch.with_values(values) for batch in micro_batches]
        scale = self._loss_scale() / sum(map(self._objective.weight, micro_batches))
        if not (passes := micro_batches[own]):  # this rank's kernels go through another one's batch all the same
            passes, scale = [min(micro_batches, key=lambda batch: batch.tokens)], 0.0
        sums, norm, largest = self._gradients(number, passes, scale)
        # A float16 step may overflow: the scaler leaves it out and tries a smaller scale.
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        like, layers = sums["loss"], self._layer_norms.norms
        scalars = [value.to(like.device, like.dtype) for value in (norm, *sums.values(), *largest, *layers)]
        grad_norm, *read = torch.stack(scalars).tolist()
        by_layer = self._layer_norms.by_layer(read[len(read) - len(layers) :])  # read last
        means = _means(dict(zip(sums, read, strict=False)))
        loss, sizes = means["loss"], read[len(sums) :][: len(largest)]
        self._require_finite(number, loss, grad_norm)
        if math.isfinite(grad_norm):
            self._require_gradients(sizes)
        seconds = time.perf_counter() - started
        tokens = sum(batch.tokens for batch in micro_batches)
        return {
            "kind": "train",
            "step": number + 1,
            "epoch": round((number + 1) / self._batches.steps_per_epoch, 4),
            **means,
            "learning_rate": rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            **({"grad_norm_by_layer": by_layer} if layers else {}),
            "tokens": tokens,
            "trained_tokens": sum(batch.trained for batch in micro_batches),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_bytes": peak_bytes(self._device),
            "predicted_peak_bytes": self._predicted_peak_bytes,
        }

    def _evaluate_if_due(self, listeners: Sequence[Listener], stopped: Callable[[], bool]) -> None:
        """Measure the held-out loss, where this step has one; a stop leaves it out, and a checkpoint stands for it."""
        if not self._held_out or not (self.done == self.steps or _due(self.done, self._train.eval_steps)):
            return
        measured = self._measure_held_out(stopped)
        during = None if measured is None else self._ranks.first(lambda: self._during(stopped))
        if measured is None or during is None:
            if not self._saver.has(self.done):
                self._save()
            raise Interrupted(self._checkpoint())
        means, trained = measured
        loss = means["loss"]
        if not math.isfinite(loss):  # the adapter may be good all the same, and its loss was finite
            notify(
                f"the held-out loss after step {self.done} is {loss}; a lower train.learning_rate may fix it",
                where="train.learning_rate",
            )
        record = {
            "kind": "eval",
            "step": self.done,
            **{name: _finite(value) for name, value in means.items()},
            **self._objective.held_out_metrics(loss),
            "trained_tokens": trained,
            **during,
        }
        is_protected = self.best.see(record) and self._protected is not None
        if is_protected:  # its checkpoint is whole before its record names it the best, and the one before goes after
            if not self._saver.has(self.done):
                self._saver.save(self.done, self._state, self._protected, drops=False)
            self._saver.wait()
        _report(listeners, record | self.best.as_dict())
        if is_protected:
            self._saver.drop_old(self._protected)

    def _measure_held_out(self, stopped: Callable[[], bool]) -> tuple[dict[str, Any], int] | None:
        """Measure held-out loss and metrics, and count the trained tokens; None where it was stopped."""
        batch_of = partial(Batch.of, documents_per_row=self._objective.documents_per_row)
        if self._held_out_values is None:
            self._held_out_values = self._objective.step_values(self._held_out_batching.over(self._held_out, batch_of))
        values = self._held_out_values | self._estimate_kl(None)

        def measure(rows: Sequence[Example]) -> list[StepOutput] | None:
            if stopped():
                return None
            batch = self._with_reference(batch_of(rows)).with_values(values)
            tokens = TrainedTokens.of(batch, self._engine.token_logprobs(batch))
            return list(outputs_of_rows(self._objective, tokens))

        def measure_all(rows: Sequence[Example]) -> list[StepOutput]:
            outputs: list[StepOutput] = []
            for measured in self._held_out_batching.over(rows, measure):
                if measured is None:
                    return []
                outputs += measured
            return outputs

        outputs = spread_rows(self._ranks, self._held_out, measure_all)
        if not outputs:
            return None
        means = _means({name: value.item() for name, value in _sums(outputs).items()})
        return means | describe_pairs(outputs), sum(example.trained for example in self._held_out)

    def _require_finite(self, number: int, loss: float, norm: float) -> None:
        if not math.isfinite(loss):
            raise JobError(
                f"the loss of step {number + 1} is {loss}\n  fix: lower train.learning_rate, or set model.dtype to "
                "bfloat16 or float32"
            )
        if not math.isfinite(norm) and not self._scaler.is_enabled():
            raise JobError(f"the gradient of step {number + 1} is not finite\n  fix: lower train.learning_rate")

    def _require_gradients(self, sizes: list[float]) -> None:
        """Check gradients once, after the first step in which they are finite.

        Args:
            sizes: Largest magnitude in the gradient of each B matrix.
        """
        if self._has_gradients:
            return
        self._has_gradients = True
        bad = [name for name, value in zip(self._learn_first, sizes, strict=True) if not 0 < value < math.inf]
        if bad:
            raise JobError(
                f"{len(bad)} {'' if is_full(self._model) else 'adapter '}matrices got no usable gradient in the first "
                f"step, first {bad[0]}: training would do nothing there\n  fix: "
                + (
                    "train an adapter"
                    if is_full(self._model)
                    else "set adapter.target_modules to modules the model uses"
                )
            )

    def _checkpoint(self, step: int | None = None) -> Path:
        """Return the path of a step's checkpoint, written or not; None: of this step's."""
        return checkpoint.path_of(self._checkpoints, self.done if step is None else step)

    def _save(self) -> None:
        self._saver.save(self.done, self._state, self._protected)


def learn_first(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the matrices that have a gradient at the first step, by name. Of a bias it may be zero (of keys)."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if is_full(model):
        return {name: parameter for name, parameter in trained.items() if parameter.dim() > 1}
    method = find_method(model.peft_config["default"])
    return {name: parameter for name, parameter in trained.items() if method.learns_first(name)}


def held_out_batching(rows_at_a_time: int, objective: Objective) -> Batching:
    """Return what takes held-out examples in batches, those of a row together."""
    return Batching(rows_at_a_time, "lower data.max_length", "held-out losses", objective.documents_per_row)


def _largest(gradient: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros(()) if gradient is None else gradient.abs().amax()


def _sums(outputs: Sequence[StepOutput]) -> dict[str, torch.Tensor]:
    """Add up weight, loss and metrics of several batches."""
    found = [{"weight": output.weight, "loss": output.loss, **output.metrics} for output in outputs]
    return {name: torch.stack([sums[name] for sums in found]).sum() for name in found[0]}


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Divide by the weight; metrics that are NaN are left out."""
    weight = sums.pop("weight")
    return {name: value / weight for name, value in sums.items() if name == "loss" or not math.isnan(value)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _report(listeners: Sequence[Listener], record: dict[str, Any]) -> None:
    record = record | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    for listener in listeners:
        listener(record)
