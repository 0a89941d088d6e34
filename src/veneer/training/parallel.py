"""A rank's share of an optimizer step, and what the ranks exchange at its end.

Every rank knows the whole step: which rows it has, and the sum of their weights, by which each rank divides its loss.
So gradients and losses of the ranks only add up, and the step is that of one process with as many micro-batches, but
for the order in which gradients are added. That order is fixed too, so that the same ranks give the same bits twice.

Gradients are exchanged once a step, after the last pass. A fused engine's are one buffer: 168 MB for the 42 million
parameters of r = 16 on 8B, a millisecond over NVLink beside a step of 700, so that they are not exchanged piecemeal
within the backward. Passes that run out of memory are redone before the exchange, by the rank that they concern.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from veneer.config import JobError, Run, RunFolder, Train, UserError
from veneer.config.files import read_json
from veneer.config.notify import notify
from veneer.data.batch import Batch, Batches, Example
from veneer.engine.choose import UNSHARDED
from veneer.engine.interface import Engine
from veneer.engine.objective import StepOutput
from veneer.machine.ranks import FIRST_WAIT, Ranks
from veneer.training.finished import with_train
from veneer.training.held_out import HeldOutRows

LEAST_WAIT = 60.0  # seconds that ranks wait for each other, at least: a step may be redone
WAIT_STEPS = 20  # steps' time that they wait, where that is more


class StepExchange:
    """A rank's part in the steps of a run.

    Args:
        ranks: this process among those of the run.
        batches: steps of the run, dealt to as many ranks.
        seed: seed of the run.
    """

    def __init__(self, ranks: Ranks, batches: Batches, seed: int) -> None:
        self.ranks = ranks
        self._batches = batches
        self._seed = seed
        self._longest = 0.0
        self._began = 0.0
        self._asked: Callable[[], bool] = lambda: False
        self._is_stopped = False

    def step(self, number: int) -> tuple[list[Batch], slice]:
        """Return the micro-batches of a step, and which of them are this rank's; a short last step may have none."""
        self._began = time.perf_counter()
        rank = self.ranks.rank
        if rank:  # the first rank's random numbers go on from its checkpoint; those of the others begin in each step
            torch.manual_seed(hash((self._seed, number, rank)) % 2**62)
        if self.ranks.size == 1:
            micro_batches = self._batches.step(number)
            return micro_batches, slice(len(micro_batches))
        by_rank = self._batches.members_by_rank(number)
        before = sum(map(len, by_rank[:rank]))
        micro_batches = [self._batches.batch_of(members) for share in by_rank for members in share]
        return micro_batches, slice(before, before + len(by_rank[rank]))

    def meet(self, number: int) -> None:
        """Wait for the other ranks, before gradients are exchanged.

        Raises:
            LostRankError: they did not come in time.
        """
        wait = max(LEAST_WAIT, WAIT_STEPS * self._longest) if self._longest else FIRST_WAIT
        self.ranks.meet(f"the end of step {number + 1}", wait)

    def add(self, parameters: Iterable[torch.nn.Parameter], sums: Sequence[torch.Tensor]) -> None:
        """Add gradients and sums up over all ranks, in place."""
        if self.ranks.size == 1:
            return
        trained = list(parameters)
        for parameter in trained:
            if parameter.grad is None:  # of a module that this rank's rows did not go through
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.add([parameter.grad for parameter in trained if parameter.grad is not None])
        self.ranks.add(sums)
        self._longest = max(self._longest, time.perf_counter() - self._began)

    def agreed(self, asked: Callable[[], bool]) -> Callable[[], bool]:
        """Return a function that says whether a stop was asked for, and on all ranks says the same.

        Args:
            asked: function that says whether this process was asked to stop.
        """
        self._asked = asked
        return asked if self.ranks.size == 1 else lambda: self._is_stopped

    def agree(self, peak_bytes: int) -> int:
        """Agree on whether to stop, once a step; returns the largest peak of all ranks."""
        if self.ranks.size == 1:
            return peak_bytes
        found = self.ranks.gather((self._asked(), peak_bytes))
        self._is_stopped = any(asked for asked, _ in found)
        return max(peak for _, peak in found)


def spread_rows(
    ranks: Ranks, rows: HeldOutRows, measure: Callable[[Sequence[Example]], list[StepOutput]]
) -> list[StepOutput]:
    """Return the outputs of held-out rows, where each rank measures its share of them.

    Args:
        ranks: this process among those of the run.
        rows: the rows.
        measure: function that returns the outputs of rows; none where it was stopped.
    """
    if ranks.size == 1:
        return measure(rows)
    size = rows.documents_per_row
    own = range(ranks.rank, len(rows) // size, ranks.size)
    outputs = measure([example for number in own for example in rows[number * size : (number + 1) * size]])
    return [output for share in ranks.gather([output.on_cpu() for output in outputs]) for output in share]


def require_parallel(run: Run, ranks: Ranks) -> None:
    """Raise UserError for a run that several GPUs cannot share; tell of a setting that is for several alone."""
    if ranks.size > 1 and run.model.task == "embedding":
        raise UserError(
            f"model.task = embedding: the loss compares all texts of a step, which lie on {ranks.size} GPUs",
            "train it on one GPU",
        )
    if run.train.shard == "layers" and run.model.task != "causal-lm":
        raise UserError(
            f"train.shard = layers: it takes the fused engine, and model.task = {run.model.task} has another",
            UNSHARDED,
        )
    if run.train.shard == "layers" and ranks.local_size == 1:
        notify("train.shard = layers: the run has one GPU here, and nothing to spread over", "info", "train.shard")


def begin_alike(ranks: Ranks, engine: Engine, model: Any) -> None:
    """Give all ranks the first one's weights, so that what a GPU computed of them differs by no bit.

    Raises:
        JobError: the fused engine failed its check on some ranks alone.
    """
    if ranks.size == 1:
        return
    names = ranks.gather(engine.name)
    if len(set(names)) > 1:
        other = names.index("reference")
        raise JobError(
            f"the fused engine does not give the reference engine's numbers on the GPU of rank {other}, and does on "
            "others\n  fix: set train.engine to reference, or leave that GPU out (CUDA_VISIBLE_DEVICES)"
        )
    trained = [parameter.data for parameter in model.parameters() if parameter.requires_grad]
    ranks.share(trained if engine.master is None else [engine.master.data])


def rows_of_step(train: Train, ranks: int) -> int:
    """Return the rows of an optimizer step over all ranks."""
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks


def dealt_as_begun(run: Run, began: RunFolder, ranks: Ranks) -> Run:
    """Return a run that goes on, on whatever number of GPUs, with as many rows a step as it began with.

    Raises:
        UserError: they cannot be dealt to so many.
    """
    plan = read_json(began.plan)
    rows, each = plan.get("rows_per_step"), run.train.per_device_train_batch_size * ranks.size
    if plan.get("gpus", 1) == ranks.size or not rows:
        return run
    if rows % each:
        raise UserError(
            f"the run began with {rows} rows a step on {plan['gpus']} GPUs, and {rows} are no multiple of {each} "
            f"(train.per_device_train_batch_size on {ranks.size} GPUs)",
            "set train.per_device_train_batch_size to a divisor, or resume it on another number of GPUs",
        )
    return with_train(run, gradient_accumulation_steps=rows // each)
