"""The loop makes optimizer steps, logs them, evaluates held-out rows, writes checkpoints and stops cleanly.

A step's loss is summed over its trained tokens and divided by their number, over all its micro-batches together, so
that how a step is cut does not change it. Two things are checked that otherwise go wrong in silence: after the first
step every LoRA B matrix must have a finite gradient that is not zero (first_gradients.py), and no loss may diverge
(divergence.py).

Passes that run out of memory are dropped and run again with less (memory.py). The update comes after all of them and
allocates nothing, so that no parameter is ever updated twice, or without the others.

A step waits for the device once, after its passes: loss, norm and checks come back in one reading. The update follows
once they are known to be good, and runs while the host lays out the next step.

Gradients of float16 runs are scaled against underflow as usual (torch's GradScaler); other runs are not.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from veneer.config import Interrupted, JobError, Train, UserError
from veneer.config.notify import notify
from veneer.data.batch import Batch, Batches
from veneer.engine.interface import Engine
from veneer.engine.objective import Objective
from veneer.machine.device import peak_bytes, rng_state, set_rng_state
from veneer.machine.ranks import ALONE, Ranks
from veneer.model.adapters.from_base import drop_frozen_gradients, starts_from_base
from veneer.model.full import is_full
from veneer.training import checkpoint
from veneer.training.alarms import Alarms
from veneer.training.best import BestStep
from veneer.training.diverged import DivergenceMessages, describe_rows, record_of
from veneer.training.divergence import DivergenceWatch, Finding
from veneer.training.first_gradients import FirstGradients
from veneer.training.full_optimizer import FullOptimizer, ReleasedGradients
from veneer.training.held_out import HeldOutRows
from veneer.training.held_out_loss import HeldOutLoss, held_out_batching
from veneer.training.layer_norms import LayerNorms
from veneer.training.memory import OutOfMemoryRecovery, describe
from veneer.training.metrics import Listener
from veneer.training.optimizer import allocate_states, optimizer_of, parameters_to_update
from veneer.training.outputs import add_up, means_of
from veneer.training.parallel import StepExchange
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
        has_separate_states: Whether the state that it goes on from is one of each matrix; see `parameters_to_update`.
        alarms: Alarms of the run; None: there are none, as in a trial of settings.
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
        has_separate_states: bool = False,
        alarms: Alarms | None = None,
    ) -> None:
        self._engine = engine
        self._alarms = alarms or Alarms()
        self._ranks = ranks
        self._exchange = StepExchange(ranks, batches, train.seed)
        self._objective = objective
        self._batches = batches
        self._held_out = held_out
        self._held_out_loss = HeldOutLoss(
            engine,
            objective,
            held_out,
            held_out_batching(rows_at_a_time, objective),
            with_reference,
            lambda: estimate_kl(None),
            ranks,
        )
        self._train = train
        self._checkpoints = checkpoints
        self._device = device
        self._predicted_peak_bytes = predicted_peak_bytes
        self._first_gradients = FirstGradients(model)
        self._updated = parameters_to_update(model, engine, train, device, has_separate_states)
        self._optimizer = optimizer_of(model, self._updated, train, device)
        self._releases = releases
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._layer_norms = LayerNorms(trained, engine.master)
        self._scaler = torch.amp.GradScaler(device, enabled=scale_loss)
        self._watch = DivergenceWatch(train.on_divergence, may_overflow=scale_loss)
        self._messages = DivergenceMessages(train, scale_loss)
        self._state = checkpoint.TrainingState(
            model, self._optimizer, self._updated, self._scaler, began_with, self._watch
        )
        self._saver = Saver(checkpoints, train.save_total_limit, ranks)
        self._recovery = OutOfMemoryRecovery(engine, self._drop_gradients, explain, most_tokens)
        self._explain = explain
        self._during = during
        self._with_reference = with_reference
        self._estimate_kl = estimate_kl
        self._model = model
        self._better = better
        self.best = BestStep(train.early_stopping, better)
        self.steps = batches.steps(train.num_train_epochs, train.max_steps)
        self.done = 0
        self.loss: float | None = None  # of the last step that was made here
        self.was_stopped = False  # a stop was asked for during the last step, which had nothing left to stop

    def resume(self, path: Path) -> None:
        """Restore a checkpoint of this run."""
        self.done = checkpoint.load(path, self._state)

    def recall(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take the evaluations before a resumed run into account.

        Raises:
            UserError: The checkpoint of the best step is gone.
        """
        self.best = BestStep(self._train.early_stopping, self._better)
        self.best.recall(records)
        if self._protected is not None and not (best := self._checkpoint(self._protected)).exists():
            raise UserError(
                f"{best}: is gone, and train.keep=best would deliver it",
                "restore it, or start a new run in another train.output_dir",
            )

    def run(
        self,
        listeners: Sequence[Listener],
        try_largest: bool = False,
        until: int | None = None,
        rewind: Callable[[int], Sequence[Mapping[str, Any]]] = lambda step: (),
    ) -> float:
        """Train to the end, to the step `until`, or until `train.early_stopping` ends it.

        Returns the mean of all steps' tokens per second.

        A checkpoint comes before the evaluation of its step, which a resumed run makes again: an evaluation may take
        longer than whoever stops the run waits for it.

        Args:
            listeners: Callbacks that get each record of metrics.jsonl.
            try_largest: Whether to run the largest micro-batch first, so that a run that does not fit ends at once.
            until: Step at which to stop with a checkpoint, from which the run can go on; None: the last one.
            rewind: Function that drops the records after a step, and returns those that are left.

        Raises:
            JobError: A step diverged, an adapter gets no gradient, or a row does not fit into memory.
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
                elif train.on_divergence == "rollback":
                    allocate_states(self._optimizer)
                    self._save()
                while self.done < last and not self.best.is_over:
                    self._saver.check()
                    record, finding = self._step(self.done)
                    record["peak_bytes"] = self._exchange.agree(record["peak_bytes"])
                    tokens, seconds = tokens + record["tokens"], seconds + record["seconds"]
                    self.done += 1
                    if finding is not None:
                        self._diverged(finding, record, listeners, rewind)
                        if self.done < finding.step:  # it went back
                            self._evaluate_if_due(listeners, stopped)
                            continue
                    is_last = self.done == last
                    if finding is None or finding.action == "none":
                        self.loss = record["loss"]
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
        if self._watch.skipped:
            notify(
                f"{self._watch.skipped} of {self.done} updates were left out, since their steps diverged",
                "info",
                "train.on_divergence",
            )
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
            _, finding = self._step(number)
            if finding is not None and finding.action != "none":
                raise JobError(finding.reason)

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
        return add_up([self._engine.forward_backward(complete(batch).scaled(scale), objective) for batch in batches])

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
            return sums, gradients.norm(), self._first_gradients.sizes(gradients.largest)
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
        return sums, norm, self._first_gradients.sizes()

    def _loss_scale(self) -> float:
        """Return the factor of the loss that keeps gradients of float16 from underflow; 1 for other runs."""
        # Only a scaler that is used lives on the device.
        return self._scaler.scale(torch.ones((), device=self._device)).item() if self._scaler.is_enabled() else 1.0

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        if self._scaler.is_enabled():
            self._scaler.update(self._scaler.get_scale())  # the same scale; forgets that gradients were unscaled

    def _step(self, number: int) -> tuple[dict[str, Any], Finding | None]:
        """Make a step; returns its record, and what is off about it. Where that acts, nothing was updated."""
        started = time.perf_counter()
        train = self._train
        assert train.learning_rate != "auto", "it is found before the loop is made"
        peak = train.learning_rate * self._watch.rate_factor
        rate = learning_rate(number, self.steps, peak, train.warmup_ratio, train.lr_scheduler_type)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_ratio", 1.0)
        micro_batches, own = self._exchange.step(number)
        values = self._objective.step_values(micro_batches) | self._estimate_kl(number)
        micro_batches = [batch.with_values(values) for batch in micro_batches]
        self._alarms.before(number + 1, micro_batches)
        scale = self._loss_scale() / sum(map(self._objective.weight, micro_batches))
        if not (passes := micro_batches[own]):  # this rank's kernels go through another one's batch all the same
            passes, scale = [min(micro_batches, key=lambda batch: batch.tokens)], 0.0
        sums, norm, largest = self._gradients(number, passes, scale)
        like, layers = sums["loss"], self._layer_norms.norms
        scalars = [value.to(like.device, like.dtype) for value in (norm, *sums.values(), *largest, *layers)]
        grad_norm, *read = torch.stack(scalars).tolist()
        by_layer = self._layer_norms.by_layer(read[len(read) - len(layers) :])  # read last
        means = means_of(dict(zip(sums, read, strict=False)))
        loss, sizes = means["loss"], read[len(sums) :][: len(largest)]
        finding = self._watch.judge(number + 1, loss, grad_norm)
        if finding is None or finding.action == "none":
            if math.isfinite(grad_norm):
                self._first_gradients.require(sizes)
            # A float16 step may overflow: the scaler leaves it out and tries a smaller scale.
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad(set_to_none=True)
        else:
            self._drop_gradients()
        seconds = time.perf_counter() - started
        tokens = sum(batch.tokens for batch in micro_batches)
        record = {
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
        if finding is None:
            self._alarms.after(record)
        return record, finding

    def _diverged(
        self,
        finding: Finding,
        record: Mapping[str, Any],
        listeners: Sequence[Listener],
        rewind: Callable[[int], Sequence[Mapping[str, Any]]],
    ) -> None:
        """Do what follows on a step that is off, once it counts as done; see `DivergenceWatch`.

        Raises:
            JobError: The run ends with it.
        """
        if finding.action == "rollback":
            finding = self._roll_back(finding, rewind)
        spoiled = self._releases and finding.action != "rollback"  # whatever the rows, no loss is good any more
        is_told = self._messages.is_due(finding)
        engine = None if spoiled else self._engine
        rows = (
            describe_rows(self._batches, finding.step - 1, engine, finding.limit)
            if is_told and self._ranks.is_first
            else ""
        )
        _report(listeners, record_of(finding, record, self.done, self._watch.rate_factor))
        if is_told:
            self._messages.tell(finding, self.done, rows, self._watch.rollbacks)

    def _roll_back(self, finding: Finding, rewind: Callable[[int], Sequence[Mapping[str, Any]]]) -> Finding:
        """Go back to the last good checkpoint, which keeps the lower rate from here on; returns what was done."""
        before = self._watch.state_dict()
        self._saver.wait()
        path = self._ranks.first(lambda: checkpoint.to_roll_back_to(self._checkpoints, self._watch.rolled_to))
        if path is None:
            return replace(finding, action="stop", reason=f"{finding.reason}; there is no checkpoint to go back to")
        self.done = checkpoint.load(path, self._state)
        self._watch.rolled_back(before, self.done)
        self._saver.save(self.done, self._state, self._protected, drops=False)
        if self._ranks.is_first:
            self._saver.wait()
            checkpoint.drop_after(self._checkpoints, self.done)
        self.best = BestStep(self._train.early_stopping, self._better)
        self.best.recall(rewind(self.done))
        return finding

    def _evaluate_if_due(self, listeners: Sequence[Listener], stopped: Callable[[], bool]) -> None:
        """Measure the held-out loss, where this step has one; a stop leaves it out, and a checkpoint stands for it."""
        if not self.evaluates_at(self.done):
            return
        measured = self._held_out_loss.measure(stopped)
        during = None if measured is None else self._ranks.first(lambda: self._during(stopped))
        if measured is None or during is None:
            if not self._saver.has(self.done):
                self._save()
            raise Interrupted(self._checkpoint())
        loss = measured["loss"]
        if not math.isfinite(loss):  # the adapter may be good all the same, and its loss was finite
            notify(
                f"the held-out loss after step {self.done} is {loss}; a lower train.learning_rate may fix it",
                where="train.learning_rate",
            )
        record = {
            "kind": "eval",
            "step": self.done,
            **{name: _finite(value) for name, value in measured.items()},
            **self._objective.held_out_metrics(loss),
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

    def evaluates_at(self, step: int) -> bool:
        """Return whether held-out rows are evaluated after a step."""
        return bool(self._held_out) and (step == self.steps or _due(step, self._train.eval_steps))

    def _checkpoint(self, step: int | None = None) -> Path:
        """Return the path of a step's checkpoint, written or not; None: of this step's."""
        return checkpoint.path_of(self._checkpoints, self.done if step is None else step)

    def _save(self) -> None:
        # Where the loss is off, the checkpoints before may be needed.
        drops = self._watch.is_good or self._train.on_divergence != "rollback"
        self._saver.save(self.done, self._state, self._protected, drops)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _report(listeners: Sequence[Listener], record: dict[str, Any]) -> None:
    record = record | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    for listener in listeners:
        listener(record)
