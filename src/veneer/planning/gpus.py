"""A run by the number of GPUs that share its steps: memory of a card, speed, time, and what it gains.

Each GPU makes as many rows of a step as one alone would, so that a step has more of them and an epoch fewer steps. What
a step takes besides is the exchange of gradients, once, after the last pass: the bytes of the trained parameters over
the link between the GPUs. And all wait for the one that was dealt most tokens: a window of steps is dealt to see. A
measured example, 8B in NF4 with r = 16, four rows of 2,048 tokens a card, H100 over NVLink: 16,869, 34,156 and 67,581
tokens/s on 1, 2 and 4, and an exchange of 168 MB in about a millisecond.

Held-out losses are measured in shares; answers during training are given by the first GPU alone (docs/many.md).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from veneer.config import Run
from veneer.data.batch import WINDOW, deal
from veneer.machine.device import named_dtype
from veneer.planning.batch_shapes import Lengths, RowShapes
from veneer.planning.forecast import Forecast
from veneer.planning.planner import MEASURED_BY_LOSS, Planner


@dataclass(frozen=True)
class OnGpus:
    """A run on so many GPUs.

    Attributes:
        gpus: their number.
        peak_bytes: memory of each.
        rows_per_step: rows of an optimizer step.
        steps: optimizer steps; None: not known.
        exchange_seconds: time of the exchange of gradients in a step.
        busiest: tokens of the GPU that has most of a step, relative to their mean.
        step_seconds, run_seconds, tokens_per_second: likely time and speed; None: not known.
        gain: rows learnt a second, relative to one GPU; None: not known.
    """

    gpus: int
    peak_bytes: int
    rows_per_step: int
    steps: int | None
    exchange_seconds: float
    busiest: float
    step_seconds: float | None
    run_seconds: float | None
    tokens_per_second: float | None
    gain: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def numbers_of_gpus(most: int) -> list[int]:
    """Return 1, 2, 4 and so on below a number, and the number."""
    return [*(2**n for n in range(most.bit_length()) if 2**n < most), most]


def by_gpus(run: Run, planner: Planner, forecast: Forecast) -> list[OnGpus]:
    """Return a run by the number of GPUs, up to those of its device; none where that has one."""
    most = planner.target.gpus
    return list(_gains(run, planner, forecast, numbers_of_gpus(most))) if most > 1 else []


def _gains(run: Run, planner: Planner, forecast: Forecast, numbers: list[int]) -> Iterator[OnGpus]:
    alone = None
    for gpus in numbers:
        if run.train.shard == "layers":
            forecast = Planner(planner.base, replace(planner.target, ranks=gpus)).forecast(run)
        found = _on(run, planner, forecast, gpus)
        alone = alone or found
        yield OnGpus(**vars(found) | {"gain": _gain(run, found, alone)})


def _gain(run: Run, many: OnGpus, one: OnGpus) -> float | None:
    if many.tokens_per_second is None or one.tokens_per_second is None:
        return None
    if many.run_seconds is None or one.run_seconds is None:
        return many.tokens_per_second / one.tokens_per_second
    rows = many.rows_per_step / one.rows_per_step if run.train.max_steps else 1  # else both learn all rows
    return rows * one.run_seconds / many.run_seconds


def _on(run: Run, planner: Planner, forecast: Forecast, gpus: int) -> OnGpus:
    """Return a run on so many GPUs, without its gain."""
    rows, train, link = forecast.rows, run.train, planner.target.gpu_link
    assert link is not None
    each = train.per_device_train_batch_size * train.gradient_accumulation_steps
    alone, together = (each if rows.count is None else min(each, rows.count)), each * gpus
    if rows.count is not None:
        together = min(together, rows.count)
    itemsize = 4 if run.adapter is not None else named_dtype(run.model.dtype, planner.target.dtype).itemsize
    exchange = link.exchange_seconds(itemsize * forecast.trainable, gpus)
    busiest = _busiest(run, planner.base.data, together, gpus)
    steps = _steps(run, rows, each * gpus)
    step_seconds = run_seconds = speed = None
    if forecast.step_seconds is not None:
        once = forecast.step_seconds[1]
        step_seconds = max(once * busiest * together / (gpus * alone), _copying(run, forecast, gpus)) + exchange
        speed = rows.tokens * together / alone / step_seconds
        if forecast.run_seconds is not None and rows.steps is not None and steps is not None:
            evaluations = (forecast.run_seconds[1] - rows.steps * once) / _evaluations(run, rows.steps)
            if not set(run.evaluate.during) - MEASURED_BY_LOSS:
                evaluations /= gpus
            run_seconds = steps * step_seconds + _evaluations(run, steps) * evaluations
    return OnGpus(
        *(gpus, forecast.peak_bytes, together, steps, exchange, busiest, step_seconds, run_seconds, speed),
    )


def _copying(run: Run, forecast: Forecast, gpus: int) -> float:
    """Return the time in which a sharded base's other parts come over the link in a step, beside the computation.

    Each pass copies them forward and backward; the link is taken to be no faster one way than in an all-reduce.
    """
    link = forecast.target.gpu_link
    if run.train.shard != "layers" or link is None:
        return 0.0
    others = (gpus - 1) * forecast.phases["load"].components.get("4-bit weights", 0)
    return 2 * forecast.rows.passes * others / link.bandwidth


def _steps(run: Run, rows: RowShapes, rows_per_step: int) -> int | None:
    """Return the optimizer steps of a run with so many rows in each."""
    if run.train.max_steps is not None or rows.count is None:
        return rows.steps
    return max(1, int(np.ceil(run.train.num_train_epochs * -(-rows.count // rows_per_step))))


def _evaluations(run: Run, steps: int) -> int:
    return 1 + (steps - 1) // run.train.eval_steps if run.train.eval_steps else 1


def _busiest(run: Run, data: Any, rows_per_step: int, gpus: int) -> float:
    """Return the tokens of the GPU that has most of a step, relative to their mean, as steps of the run are dealt."""
    if gpus == 1 or run.data.packing or not isinstance(data, tuple):
        return 1.0
    documents = data[2] if len(data) == 3 else 1
    lengths: Lengths = data[0].within(run, documents)
    if not len(lengths.tokens):
        return 1.0
    sizes = lengths.tokens.reshape(-1, documents).sum(1)
    # As in `Batches`, the rows of some steps are sorted, so that those of a step are of similar length.
    drawn = -np.sort(-np.random.default_rng(0).choice(sizes, WINDOW * rows_per_step))
    rows, most, slowest = np.arange(rows_per_step), -(-rows_per_step // gpus), 0
    for step in drawn.reshape(WINDOW, rows_per_step):
        slowest += max(int(step[own].sum()) for own in deal(rows, step, gpus, most))
    return float(gpus * slowest / drawn.sum())
