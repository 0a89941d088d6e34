"""The loop: optimizer steps, logging, held-out losses, checkpoints, and a clean stop.

A step's loss is summed over its trained tokens and divided by their number, over all its micro-batches together, so
that how a step is cut does not change it. Two things are checked that otherwise go wrong in silence: after the first
step every LoRA B matrix must have a finite gradient that is not zero, and no loss may ever be NaN or infinite.

Gradients of float16 runs are scaled against underflow as usual (torch's GradScaler); other runs are not.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from veneer.config import Interrupted, JobError, Train
from veneer.data import Batch, Batches
from veneer.engine import Engine
from veneer.model.adapters import is_lora_b
from veneer.plan.machine import peak_bytes
from veneer.train import checkpoint
from veneer.train.metrics import Listener
from veneer.train.optimizer import build_optimizer
from veneer.train.schedule import learning_rate


class Loop:
    """Trains an adapter.

    Args:
        model: The PEFT model whose adapter is trained.
        engine: Computes its losses and gradients.
        batches: The training data.
        held_out: Batches for the held-out loss; may be empty.
        train: The settings.
        checkpoints: Folder of the run's checkpoints.
        data_hash: Fingerprint of the training data, kept in checkpoints.
        device: Where the model is.
        scale_loss: Whether gradients need scaling (float16).
    """

    def __init__(
        self,
        model: Any,
        engine: Engine,
        batches: Batches,
        held_out: Sequence[Batch],
        train: Train,
        checkpoints: Path,
        data_hash: str,
        device: str,
        scale_loss: bool = False,
    ) -> None:
        self._model = model
        self._engine = engine
        self._batches = batches
        self._held_out = held_out
        self._train = train
        self._checkpoints = checkpoints
        self._data_hash = data_hash
        self._device = device
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [parameter for _, parameter in self._named]
        self._optimizer = build_optimizer(self._parameters, train, device)
        self._scaler = torch.amp.GradScaler(device, enabled=scale_loss)
        self.steps = batches.steps(train.num_train_epochs, train.max_steps)
        self.done = 0
        self._has_gradients = False

    def resume(self, path: Path) -> None:
        """Restore a checkpoint of this run."""
        self.done = checkpoint.load(path, self._model, self._optimizer, self._scaler, self._data_hash)

    def run(self, listeners: Sequence[Listener]) -> float:
        """Train to the end; returns the mean of all steps' tokens per second.

        Raises:
            JobError: A loss is not finite, or an adapter gets no gradient.
            Interrupted: The user stopped the run; a checkpoint was written.
        """
        train = self._train
        tokens, seconds = 0, 0.0
        for listener in listeners:
            listener.on_start(self.steps, self.done)
        try:
            with _stop_signal() as stopped:
                if self.done == self.steps and self._held_out:  # resumed after the last step
                    _tell(listeners, self._evaluate())
                while self.done < self.steps:
                    record = self._step(self.done)
                    self.done += 1
                    tokens, seconds = tokens + record["tokens"], seconds + record["seconds"]
                    is_last = self.done == self.steps
                    if self.done % train.logging_steps == 0 or is_last:
                        _tell(listeners, record)
                    if is_last:  # before anything else can fail
                        self._save()
                    if self._held_out and (is_last or _due(self.done, train.eval_steps)):
                        _tell(listeners, self._evaluate())
                    if not is_last and (stopped() or _due(self.done, train.save_steps)):
                        path = self._save()
                        if stopped():
                            raise Interrupted(path)
        except torch.OutOfMemoryError as error:
            raise JobError(
                f"out of memory in step {self.done + 1}: {str(error).split('. ')[0]}\n  fix: halve "
                "train.per_device_train_batch_size and double train.gradient_accumulation_steps (the same training), "
                "set train.gradient_checkpointing, or lower data.max_length"
            ) from None
        finally:
            for listener in listeners:
                listener.on_end()
        return round(tokens / seconds, 1) if seconds else 0.0

    def _step(self, number: int) -> dict[str, Any]:
        started = time.perf_counter()
        train = self._train
        rate = learning_rate(number, self.steps, train.learning_rate, train.warmup_ratio, train.lr_scheduler_type)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        micro_batches = self._batches.step(number)
        weight = sum(batch.weight for batch in micro_batches)
        scale = self._scaler.scale(torch.ones((), device=self._device)).item() / weight
        total = torch.stack([self._engine.forward_backward(batch, scale) for batch in micro_batches]).sum()
        loss = total.item() / weight
        if not math.isfinite(loss):
            raise JobError(
                f"the loss of step {number + 1} is {loss}\n  fix: lower train.learning_rate, or set model.dtype to "
                "bfloat16 or float32"
            )
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, train.max_grad_norm or math.inf).item()
        # A float16 step may overflow: the scaler leaves it out and tries a smaller scale.
        if math.isfinite(norm):
            self._require_gradients()
        elif not self._scaler.is_enabled():
            raise JobError(f"the gradient of step {number + 1} is not finite\n  fix: lower train.learning_rate")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        tokens = sum(batch.tokens for batch in micro_batches)
        return {
            "kind": "train",
            "step": number + 1,
            "epoch": round((number + 1) / self._batches.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": tokens,
            "trained_tokens": sum(batch.trained for batch in micro_batches),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_bytes": peak_bytes(self._device),
        }

    def _evaluate(self) -> dict[str, Any]:
        try:
            total = sum(self._engine.losses(batch).sum().item() for batch in self._held_out)
        except torch.OutOfMemoryError:
            raise JobError("out of memory in the held-out loss\n  fix: lower evaluate.batch_size") from None
        loss = total / sum(batch.weight for batch in self._held_out)
        if not math.isfinite(loss):
            raise JobError(f"the held-out loss after step {self.done} is {loss}\n  fix: lower train.learning_rate")
        perplexity = math.exp(loss) if loss < 700 else None
        return {
            "kind": "eval",
            "step": self.done,
            "loss": loss,
            "perplexity": perplexity,
            "trained_tokens": sum(batch.trained for batch in self._held_out),
        }

    def _require_gradients(self) -> None:
        """Checked once, after the first step whose gradients are finite."""
        if self._has_gradients:
            return
        self._has_gradients = True
        bad = [
            name
            for name, parameter in self._named
            if is_lora_b(name) and (parameter.grad is None or not 0 < parameter.grad.abs().max().item() < math.inf)
        ]
        if bad:
            raise JobError(
                f"{len(bad)} adapter matrices got no usable gradient in the first step, first {bad[0]}: training "
                "would do nothing there\n  fix: set adapter.target_modules to modules the model uses"
            )

    def _save(self) -> Path:
        path = checkpoint.save(
            self._checkpoints, self.done, self._model, self._optimizer, self._scaler, self._data_hash
        )
        checkpoint.drop_old(self._checkpoints, self._train.save_total_limit)
        return path


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _tell(listeners: Sequence[Listener], record: dict[str, Any]) -> None:
    for listener in listeners:
        listener.on_record(record)


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C (or a polite kill) asks the loop to stop after the step; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(signum: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
