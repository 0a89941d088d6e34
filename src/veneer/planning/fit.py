"""Finds changes of settings that make a run fit, the cheapest first.

The order is: packing, micro-batch against accumulation, recomputation, the optimizer, its states on the host, shorter
answers, shorter rows, 4 bits, a smaller base of the same family. The first six change no number of the training, or
hardly one. Held-out rows need no change: their batch size follows from memory. Changes are added one by one until the
run fits; then each that turns out not to be needed is undone, the costliest first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from veneer.config import Run, UserError
from veneer.planning.forecast import Forecast
from veneer.planning.memory import frozen_bytes
from veneer.planning.planner import Planner

SHORTEST = 256  # tokens; a shorter max_length is not worth a run
SHORTEST_ANSWER = 64


@dataclass(frozen=True)
class Change:
    """One change of settings.

    Attributes:
        id: packing, micro-batch, checkpointing, optimizer, offload, answers, length, 4-bit or base.
        settings: new values by `section.key`.
        cost: cost in a few words.
    """

    id: str
    settings: dict[str, Any]
    cost: str


@dataclass(frozen=True)
class Fitted:
    """A run that fits, and the changes that made it fit.

    Attributes:
        run: the changed run.
        changes: changes in order; none: it fits as it is.
        forecast: forecast of the changed run.
    """

    run: Run
    changes: list[Change]
    forecast: Forecast


def fit(run: Run, planner: Planner, smaller: Callable[[Run, Planner], Iterator[tuple[str, Planner]]]) -> Fitted | None:
    """Find the cheapest changes that make a run fit with memory left over; None: there are none.

    Args:
        run: the settings.
        planner: planner of its base and device.
        smaller: function that yields smaller bases than a run's, the largest first, each with its planner.
    """
    found = _with_changes(run, planner)
    if found is not None:
        return found
    for base, other in smaller(run, planner):
        change = Change("base", {"model.base": base, "model.revision": None}, "a smaller model of the same family")
        changed = apply(run, change)
        if _verdict(changed, other) is not None and (found := _with_changes(changed, other)) is not None:
            return Fitted(found.run, [change, *found.changes], found.forecast)
    return None


def apply(run: Run, change: Change) -> Run:
    """Return a run with other settings, validated as any run is."""
    values = run.model_dump()
    for name, value in change.settings.items():
        section, _, key = name.partition(".")
        if key:
            values[section][key] = value
        else:
            values[section] = value
    return Run.model_validate(values)


def _with_changes(run: Run, planner: Planner) -> Fitted | None:
    shapes, forecast = planner.base.shapes, planner.forecast(run)
    weights = sum(frozen_bytes(shapes, shapes.quantizable(), True, 2).values())
    if forecast.streamed_bytes is None and weights > planner.target.budget_bytes:
        return None  # the weights alone are too much, even in 4 bits
    if forecast.verdict == "fits":
        return Fitted(run, [], forecast)
    tried: dict[str, list[Change]] = {}  # changes by kind, from mild to severe; the last of each applies
    for kind in KINDS:
        for change in kind(_changed(run, tried), planner):
            with_it = tried | {change.id: [*tried.get(change.id, []), change]}
            verdict = _verdict(_changed(run, with_it), planner)
            if verdict is None:
                continue
            tried = with_it
            if verdict == "fits":
                tried = _mildest(run, tried, planner)
                changed = _changed(run, tried)
                return Fitted(changed, [changes[-1] for changes in tried.values()], planner.forecast(changed))
    return None


def _mildest(run: Run, tried: dict[str, list[Change]], planner: Planner) -> dict[str, list[Change]]:
    """Drop each change, or make it milder, where the others suffice, the costliest first."""
    for name in list(reversed(tried))[1:]:
        for count in range(len(tried[name])):
            milder = {n: changes[:count] if n == name else changes for n, changes in tried.items()}
            milder = {n: changes for n, changes in milder.items() if changes}
            if _verdict(_changed(run, milder), planner) == "fits":
                tried = milder
                break
    return tried


def _verdict(run: Run, planner: Planner) -> str | None:
    """Return the verdict on a changed run; None: its other settings do not go with the change, as 4 bits with PiSSA."""
    try:
        return planner.forecast(run).verdict
    except UserError:
        return None


def _changed(run: Run, tried: dict[str, list[Change]]) -> Run:
    for changes in tried.values():
        run = apply(run, changes[-1])
    return run


def _packing(run: Run, planner: Planner) -> Iterator[Change]:
    """Propose packed sequences instead of padded rows: as many tokens a step in fewer, smaller micro-batches."""
    rows = planner.rows(run)
    train = run.train
    a_step = rows.tokens / run.data.max_length  # packs that hold the tokens of a step
    if run.data.packing or rows.unread is not None or train.per_device_train_batch_size == 1 or planner.base.has_pairs:
        return
    if rows.tokens > 0.5 * train.per_device_train_batch_size * train.gradient_accumulation_steps * rows.fullest.length:
        return
    yield Change(
        "packing",
        {
            "data.packing": True,
            "train.per_device_train_batch_size": 1,
            "train.gradient_accumulation_steps": max(1, round(a_step)),
        },
        "nothing; a step holds about the same tokens",
    )


def _micro_batch(run: Run, planner: Planner) -> Iterator[Change]:
    size, times = run.train.per_device_train_batch_size, run.train.gradient_accumulation_steps
    for smaller in range(size - 1, 0, -1):
        if size * times % smaller == 0:
            settings = {
                "train.per_device_train_batch_size": smaller,
                "train.gradient_accumulation_steps": size * times // smaller,
            }
            yield Change("micro-batch", settings, "some speed; the training is the same")


def _checkpointing(run: Run, planner: Planner) -> Iterator[Change]:
    if run.train.gradient_checkpointing is False:
        yield Change("checkpointing", {"train.gradient_checkpointing": "auto"}, "up to a third of the speed")


def _optimizer(run: Run, planner: Planner) -> Iterator[Change]:
    if run.train.optim not in ("auto", "adamw_8bit", "paged_adamw_8bit") and planner.target.device == "cuda":
        yield Change("optimizer", {"train.optim": "adamw_8bit"}, "nothing measurable")


def _offload(run: Run, planner: Planner) -> Iterator[Change]:
    if not run.train.optim.startswith("paged") and planner.target.device == "cuda":
        yield Change("offload", {"train.optim": "paged_adamw_8bit"}, "time to move the optimizer's states")


def _length(run: Run, planner: Planner) -> Iterator[Change]:
    longest = run.data.max_length
    for part in (0.75, 0.5, 0.375, 0.25, 0.125):
        length = int(longest * part) // 64 * 64
        if length >= SHORTEST:
            yield Change("length", {"data.max_length": length}, "longer rows are left out or cut")


def _answers(run: Run, planner: Planner) -> Iterator[Change]:
    """Propose shorter answers, where `veneer evaluate` needs more than training even with one row at a time."""
    for longest in (run.evaluate.max_new_tokens // part for part in (2, 4, 8)):
        if longest >= SHORTEST_ANSWER and planner.forecast(run).peak_phase == "generation":
            yield Change("answers", {"evaluate.max_new_tokens": longest}, "longer answers are cut")


def _quantization(run: Run, planner: Planner) -> Iterator[Change]:
    if run.quantization is None:
        yield Change("4-bit", {"quantization": {"bits": 4}}, "some speed, and a little quality")


KINDS: list[Callable[[Run, Planner], Iterator[Change]]] = [
    *(_packing, _micro_batch, _checkpointing, _optimizer, _offload, _answers, _length, _quantization),
]
