"""Runs passes again where memory ran out: with a placement that needs less, then with smaller micro-batches.

A plan cannot foresee fragmentation, nor another process on the card. A step whose passes do not fit is dropped whole:
outputs, gradients, the allocator's free memory; and the random numbers are put back to where it began. Then the engine
tightens its placement, which changes no bit of the result. Once nothing is left to tighten, micro-batches are cut in
halves from there on, which changes it by rounding (and by other dropout masks), since a step's loss is normalized over
the whole step. The optimizer is no part of this: nothing is redone once it has changed a parameter.

What a failed pass made lives as long as its frames, and these as long as the exception: all that is done about it comes
after the `except` block, which has kept a text alone.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from veneer.config import JobError
from veneer.config.notify import notify
from veneer.data.batch import Batch
from veneer.engine.interface import Engine
from veneer.engine.placement import MemoryPlacement
from veneer.machine.batching import is_out_of_memory
from veneer.machine.device import release_memory, rng_state, set_rng_state
from veneer.planning.fit import Change, apply, fit
from veneer.planning.planner import Planner
from veneer.planning.predict import Prediction

Result = TypeVar("Result")
OTHERWISE = (
    "end what else holds memory there (nvidia-smi shows it), set `quantization: {bits: 4}`, or lower data.max_length"
)


class OutOfMemoryRecovery:
    """Runs the passes of a step until they fit.

    Args:
        engine: engine that runs them, which is asked to tighten its placement.
        drop_gradients: function that drops the gradients of a step, and what else its passes left.
        explain: function that says what the run needs and what to change; called once nothing is left to try.
        most_tokens: tokens of a micro-batch beyond which it is cut; None: none is. A single document is never cut.
    """

    def __init__(
        self,
        engine: Engine,
        drop_gradients: Callable[[], None],
        explain: Callable[[], str],
        most_tokens: int | None = None,
    ) -> None:
        self._engine = engine
        self._drop_gradients = drop_gradients
        self._explain = explain
        self._running: Batch | None = None
        self.most_tokens = most_tokens

    def run(self, what: str, batches: Sequence[Batch], compute: Callable[[Iterable[Batch]], Result]) -> Result:
        """Return what `compute` makes of the micro-batches, or of their halves.

        Args:
            what: name of the passes, for messages.
            batches: micro-batches, as the settings have them.
            compute: function that runs the passes, over the batches as often as it needs. It keeps nothing but its
                result and gradients, and changes no parameter.

        Raises:
            JobError: a single document does not fit, or something beside the passes.
        """
        began_with = rng_state()
        while True:
            try:
                return compute(_EachTime(self._each, batches))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                shortage = describe(error)
            failed, self._running = self._running, None
            self._drop_gradients()
            release_memory()
            set_rng_state(began_with)
            size = "beside its passes" if failed is None else f"with {_size(failed)}"
            message = f"out of memory in {what} {size} ({shortage})"
            if (change := self._engine.tighten()) is not None:
                notify(
                    f"{message}: the placement is tightened ({change}), and it is redone",
                    where="train.gradient_checkpointing",
                )
            elif failed is not None and failed.rows > 1:
                self.most_tokens = _most_tokens(failed, message)
            else:
                raise JobError(f"{message}: {self._explain()}")

    def _each(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield micro-batches that are small enough, and remember which one is running."""
        for batch in batches:
            for part in cut(batch, self.most_tokens):
                self._running = part
                yield part
        self._running = None


class _EachTime:
    """Batches that a function yields anew whenever they are gone through."""

    def __init__(self, each: Callable[[Sequence[Batch]], Iterator[Batch]], batches: Sequence[Batch]) -> None:
        self._each, self._batches = each, batches

    def __iter__(self) -> Iterator[Batch]:
        return self._each(self._batches)


def place(
    plan: Callable[[Sequence[Batch] | None], MemoryPlacement], largest: Sequence[Batch], explain: Callable[[], str]
) -> tuple[MemoryPlacement, int | None]:
    """Return the placement, and `most_tokens` of `OutOfMemoryRecovery`, for smaller micro-batches where none fits.

    Args:
        plan: function that chooses a placement, by the parts that the largest micro-batches are cut into; None: whole.
        largest: the largest micro-batches of the run.
        explain: argument of `OutOfMemoryRecovery`.

    Raises:
        JobError: a single document does not fit.
    """
    parts, most_tokens = list(largest), None
    while True:
        try:
            return plan(None if most_tokens is None else parts), most_tokens
        except torch.OutOfMemoryError as error:
            shortage = describe(error)
        release_memory()
        failed = max(parts, key=lambda part: part.tokens)
        message = f"out of memory in the largest micro-batch, tried first, with {_size(failed)} ({shortage})"
        if failed.rows == 1:
            raise JobError(f"{message}: {explain()}")
        most_tokens = _most_tokens(failed, message)
        parts = [part for batch in largest for part in cut(batch, most_tokens)]


def _most_tokens(failed: Batch, message: str) -> int:
    """Return the tokens beyond which micro-batches are cut once this one has failed, and notify of it."""
    most_tokens = max(half.tokens for half in failed.halved())
    notify(
        f"{message}: micro-batches of more than {most_tokens:,} tokens are cut in two from here on, and it is redone; "
        "the training is the same",
        where="train.per_device_train_batch_size",
    )
    return most_tokens


def cut(batch: Batch, most_tokens: int | None) -> list[Batch]:
    """Return the parts of a batch, halved until each has at most so many tokens, or is a single row."""
    if most_tokens is None or batch.tokens <= most_tokens or batch.rows == 1:
        return [batch]
    return [part for half in batch.halved() for part in cut(half, most_tokens)]


def _size(batch: Batch) -> str:
    return (
        f"a single row of {batch.tokens:,} tokens" if batch.rows == 1 else f"{batch.rows} rows, {batch.tokens:,} tokens"
    )


def describe(error: BaseException) -> str:
    """Return how much was asked for when memory ran out, or the error's first sentence where it does not say."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    return f"tried to allocate {asked[1]}" if asked else str(error).split(". ")[0] or type(error).__name__


def need_and_fix(prediction: Prediction, device: str) -> str:
    """Return what training needs with one row at a time, what there is, and the cheapest changes that help.

    Args:
        prediction: the prediction of the run, which was too low.
        device: device of the run.
    """
    planner, run = prediction.planner, prediction.run
    if run.model.task != "causal-lm":
        return "a classifier's passes can be made smaller by hand alone\n  fix: lower data.max_length"
    train, target = run.train, planner.target
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    single = {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": rows}
    run = apply(run, Change("micro-batch", single, ""))
    forecast = planner.forecast(run)
    needed, there = forecast.phases[forecast.training_phase].bytes, target.budget_bytes
    if device == "cuda":  # less than when the run was planned, if another process has taken some since
        there = min(there, torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    # It did not fit, so what helps needs less than was predicted, however much there seems to be.
    planner = Planner(planner.base, replace(target, budget_bytes=min(needed, there)))
    found = fit(run, planner, lambda run, planner: iter(()))
    fix = OTHERWISE
    if found is not None and found.changes:
        settings = [f"{name}={value}" for change in found.changes for name, value in change.settings.items()]
        fix = f"set {', '.join(settings)} ({'; '.join(change.cost for change in found.changes)})"
    return (
        f"with one row at a time training is predicted to need {needed / 2**30:.1f} GiB, and "
        f"{there / 2**30:.1f} GiB were there\n  fix: {fix}"
    )
