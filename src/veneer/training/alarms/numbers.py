"""Alarms about the numbers of a step: its loss against one measured apart, its rate, its gradients, what is missing."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from veneer.training.alarms.alarm import Alarm, JobFacts, WatchedStep

CHECKED_AT = 10  # step of the process that is measured apart
TOLERANCE = {False: 0.001, True: 0.02}  # of the loss, in float32 and in 16 bits
LEAK = {False: 1e-5, True: 0.02}  # mean difference of log-probabilities, likewise
WATCHED_STEPS, WATCHED_VALUES = 20, 1024
RESOLUTION = 1e-6  # relative: updates that are smaller are lost in a float32 weight
MOST = 3.3  # size of AdamW's updates in rates: (1 - 0.9) / sqrt(1 - 0.999) is 3.2
STEPS_IN_A_ROW = 10  # with a layer without gradient
ZEROS_IN_A_ROW, OVERFLOWS_IN_A_ROW, GONE_IN_A_ROW = 3, 12, 18


class LossNotOwn(Alarm):
    """Tells that the logged loss is not that of the step's own rows: a running mean, another step's, or a NaN replaced.

    Once, at its tenth step, a process measures the rows of the step as held-out rows are measured, before the step
    changes the weights: a third of that step's time. It cannot see a difference of less than 0.1% (in 16 bits: 2%), nor
    a fault that the measurement shares. It is silent where training passes drop something, and for
    objectives that compare with a reference or with other rows.
    """

    where = "metrics.jsonl"

    def __init__(self, facts: JobFacts) -> None:
        self._is_on = facts.is_supervised and not facts.has_dropout
        self._tolerance = TOLERANCE[facts.is_16_bit]
        self._own: float | None = None

    def before(self, step: WatchedStep) -> None:
        if not self._is_on or step.in_process != CHECKED_AT:
            return
        weights = [batch.weights_T[batch.targets_T >= 0].double() for batch in step.batches]
        losses = [-(found * of).sum() for found, of in zip(step.logprobs, weights, strict=True)]
        self._own = float(sum(losses)) / float(sum(of.sum() for of in weights))

    def after(self, step: WatchedStep) -> str | None:
        own, self._own = self._own, None
        logged = step.record["loss"]
        if own is None or abs(logged - own) <= self._tolerance * abs(own) + 1e-4:
            return None
        return (
            f"the loss of step {step.number} is logged as {logged:.4f}, and its rows have {own:.4f}, measured apart: "
            "what is logged, or trained, is not the step's own loss\n  fix: set train.engine to reference and compare; "
            "`veneer verify` says which part is wrong"
        )


class DocumentsLeak(Alarm):
    """Tells that documents of a batch see each other, as packed rows must not.

    Once, at its tenth step, a process replaces the trained tokens of the first document of a micro-batch, and measures
    the others again: the shapes and so the kernels are the same, and their log-probabilities must be, too. It cannot
    see a leak that comes with other shapes, nor one from a later document into an earlier one.
    """

    where = "data.packing"

    def __init__(self, facts: JobFacts) -> None:
        self._limit = LEAK[facts.is_16_bit]
        self._is_on = facts.documents_per_row == 1 and facts.is_causal_lm
        self._difference = 0.0

    def before(self, step: WatchedStep) -> None:
        several = [n for n, batch in enumerate(step.batches) if len(batch.lengths) > 1]
        if not self._is_on or step.in_process != CHECKED_AT or not several:
            return
        batch, length = step.batches[several[-1]], step.batches[several[-1]].lengths[0]
        trained = (batch.targets_T[:length] >= 0).nonzero()
        if not len(trained):
            return
        first = int(trained[0]) + 1
        ids_T = batch.ids_T.clone()
        ids_T[first:length] = ids_T[first:length].flip(0).roll(1) if length - first > 2 else ids_T[0]
        if torch.equal(ids_T, batch.ids_T):
            return
        others = slice(len(trained), None)
        again = step.engine.token_logprobs(replace(batch, ids_T=ids_T)).cpu().double()
        difference = (again - step.logprobs[several[-1]])[others].abs()
        self._difference = float(difference.mean()) if len(difference) else 0.0

    def after(self, step: WatchedStep) -> str | None:
        if self._difference <= self._limit:
            return None
        return (
            f"documents of a batch see each other: with other tokens in one of them, log-probabilities of the others "
            f"change by {self._difference:.2g} on average, where they must not\n  fix: set data.packing to false and "
            "train.engine to reference; `veneer verify` says which part is wrong"
        )


class RateNotScheduled(Alarm):
    """Tells that weights move by another rate than the schedule's: a warm-up that is ignored, a rate that is not set.

    In the first 20 steps of a process it compares a thousand values of one matrix before and after each update: AdamW
    moves the typical one by about the rate, and by 3.2 times as much at most. So it sees a warm-up of four steps or
    more that is ignored, and updates that do nothing. It cannot see a rate that is off by less, nor one that is too
    low, since AdamW moves a matrix of hardly any gradient by less too. It is silent for whole weights and for adapters
    without B matrices.
    """

    where = "train.warmup_ratio"

    def __init__(self, facts: JobFacts) -> None:
        self._watched = facts.watched
        self._rate, self._ratio = facts.rate, facts.rate_ratio
        pins = facts.device == "cuda"
        count = 0 if self._watched is None else min(WATCHED_VALUES, self._watched.numel())
        self._values = [torch.empty(count, pin_memory=pins) for _ in range(2)]
        self._made: int | None = None  # step whose update lies between the two
        self._low = 0

    def before(self, step: WatchedStep) -> None:
        if self._watched is not None and step.in_process <= WATCHED_STEPS + 1:
            self._values.reverse()
            now = self._watched.detach().reshape(-1)[: len(self._values[1])]
            self._values[1].copy_(now, non_blocking=True)  # it is there once the step was read

    def after(self, step: WatchedStep) -> str | None:
        if self._watched is None or step.in_process > WATCHED_STEPS + 1:
            return None
        made, self._made = self._made, None if step.record["grad_norm"] is None else step.number
        if made != step.number - 1 or not made:
            return None
        rate = self._rate(made - 1) * self._ratio
        if rate < RESOLUTION * float(self._values[1].abs().amax()):
            return None
        moves = np.abs((self._values[1] - self._values[0]).numpy())
        typical = float(np.median(moves[moves > 0])) if (moves > 0).any() else 0.0
        self._low = 0 if typical else self._low + 1
        if typical <= MOST * rate and self._low < 2:
            return None
        return (
            f"step {made} moved weights by {typical:.2g}, and its learning rate is {rate:.2g} by the schedule: another "
            "rate is applied\n  fix: look at learning_rate in metrics.jsonl, and set train.optim to adamw_torch"
        )


class LayerWithoutGradient(Alarm):
    """Tells that a layer gets no gradient any more: its adapters learn nothing.

    It reads `grad_norm_by_layer` of logged steps, so it cannot see one matrix of a layer whose others have a gradient;
    the first step is checked matrix by matrix, and ends the run.
    """

    where = "adapter.layers_to_transform"

    def __init__(self, facts: JobFacts) -> None:
        self._zero: Counter[int] = Counter()

    def after(self, step: WatchedStep) -> str | None:
        for layer, norm in enumerate(step.record.get("grad_norm_by_layer", ())):
            self._zero[layer] = self._zero[layer] + 1 if norm == 0 else 0
        dead = sorted(layer for layer, count in self._zero.items() if count >= STEPS_IN_A_ROW)
        if not dead:
            return None
        return (
            f"layers {', '.join(map(str, dead))} have had no gradient in the last {STEPS_IN_A_ROW} logged steps, by "
            f"step {step.number}: nothing is learnt there\n  fix: set model.dtype to bfloat16 or float32, or train "
            "other layers (adapter.layers_to_transform, adapter.target_modules)"
        )


class NumbersMissing(Alarm):
    """Tells of numbers that were not finite and do not show as such: left out, replaced by zero, or skipped.

    It reads the records: float16 updates that overflow one after the other, a metric that is gone, a loss or a gradient
    that is exactly zero. It cannot see a NaN that is replaced by another number; `LossNotOwn` may.
    """

    where = "model.dtype"

    def __init__(self, facts: JobFacts) -> None:
        self._is_supervised = facts.is_supervised
        self._known: set[str] = set()
        self._in_a_row: Counter[str] = Counter()

    def after(self, step: WatchedStep) -> str | None:
        record = step.record
        for name, is_so in self._signs(record):
            self._in_a_row[name] = self._in_a_row[name] + 1 if is_so else 0
        self._known |= {name for name in record if name not in ("grad_norm_by_layer",)}
        limits = {"overflow": OVERFLOWS_IN_A_ROW, "zero loss": ZEROS_IN_A_ROW, "zero gradient": ZEROS_IN_A_ROW}
        found = [name for name, count in self._in_a_row.items() if count >= limits.get(name, GONE_IN_A_ROW)]
        if not found:
            return None
        name, count = found[0], self._in_a_row[found[0]]
        what = {
            "overflow": f"the last {count} updates were left out, since their gradients were not finite in float16",
            "zero loss": f"the loss was exactly 0 in the last {count} steps: a NaN may have been replaced",
            "zero gradient": f"the gradient was exactly 0 in the last {count} steps, and the loss was not",
        }.get(name, f"the records of the last {count} steps have no {name}: it was NaN, or no row had one")
        return (
            f"step {step.number}: {what}\n  fix: set model.dtype to bfloat16 or float32, or lower train.learning_rate"
        )

    def _signs(self, record: dict[str, Any]) -> list[tuple[str, bool]]:
        norm, loss = record["grad_norm"], record["loss"]
        signs = [("overflow", norm is None), ("zero gradient", norm == 0 and loss != 0)]
        signs += [("zero loss", loss == 0)] if self._is_supervised else []
        return signs + [(name, name not in record) for name in sorted(self._known)]
