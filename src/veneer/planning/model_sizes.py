"""Finds the bases that a given amount of memory can train, from 0.1B to 72B, by method; and how long a row may be.

Each is planned with the least memory: one row at a time, activations recomputed, 8-bit optimizer, adapters on all
linear layers; with its weights streamed from the host where that alone makes it fit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.config import Adapter, Model, Run
from veneer.config.names import find_model
from veneer.machine.cards import CARDS
from veneer.model.adapters import find_method
from veneer.model.known import MODEL_SIZES, smaller_siblings
from veneer.planning.base import PlannedModel
from veneer.planning.forecast import Forecast
from veneer.planning.held_out import SPARE
from veneer.planning.planner import Planner
from veneer.planning.target import TargetDevice, device_named

METHODS = ("full", "lora", "qlora")
ROW_STEP = 1024  # tokens to which a longest row is rounded down
LONGEST_ROW = 2**20  # tokens, where a base's positions set no limit


@dataclass(frozen=True)
class ModelSize:
    """A base and the memory its training needs.

    Attributes:
        base: hub id.
        parameters: number of its parameters.
        peak_bytes: peak of training and evaluation, by method; methods that did not fit with a smaller base are left
            out.
        streamed_bytes: peak of training with streamed weights, of the methods that can.
    """

    base: str
    parameters: int
    peak_bytes: dict[str, int]
    streamed_bytes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, base: str, parameters: int, forecasts: dict[str, Forecast]) -> "ModelSize":
        """Return the memory that forecasts by method say."""
        peaks = {method: found.resident_bytes for method, found in forecasts.items()}
        streamed = {method: found.streamed_bytes for method, found in forecasts.items()}
        return cls(base, parameters, peaks, {m: count for m, count in streamed.items() if count is not None})

    def best(self, budget_bytes: int) -> str | None:
        """Return the best method that fits with memory left over: full before lora before qlora."""
        return next((m for m in METHODS if self.fits(m, budget_bytes)), None)

    def fits(self, method: str, budget_bytes: int) -> bool:
        """Whether a method fits with memory left over, with streamed weights if need be."""
        least = min(self.peak_bytes.get(method, budget_bytes + 1), self.streamed_bytes.get(method, budget_bytes + 1))
        return least * (1 + SPARE) <= budget_bytes

    def streams(self, method: str, budget_bytes: int) -> bool:
        """Whether a method fits only with streamed weights."""
        resident = self.peak_bytes.get(method, 0) * (1 + SPARE) <= budget_bytes
        return not resident and self.fits(method, budget_bytes)


def least_memory(run: Run, base: str | None = None) -> Run:
    """Return a run with the settings that need least memory and change nothing but speed."""
    values = run.model_dump()
    values["train"] |= {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "auto", "optim": "auto",
    }  # fmt: skip
    values["evaluate"] |= {"batch_size": 1}
    if base is not None:
        values["model"] |= {"base": base, "revision": None}
        values["adapter"] |= {
            "target_modules": "all-linear", "exclude_modules": None, "layers_to_transform": None,
            "rank_pattern": {}, "alpha_pattern": {},
        }  # fmt: skip
    return Run.model_validate(values)


def _with_lora(run: Run) -> Run:
    """Return a run with plain LoRA on the modules of its adapter: other methods do not go with each way to train."""
    own = run.adapter or Adapter()
    of_lora = ("r", "rank_pattern") if find_method(own).is_lora else ()
    kept = (*of_lora, "target_modules", "exclude_modules", "layers_to_transform", "lora_dropout")
    adapter = Adapter(**{name: getattr(own, name) for name in kept})
    train = run.train.model_copy(update={"loraplus_lr_ratio": None})
    return run.model_copy(update={"adapter": adapter, "train": train})


def model_sizes(run: Run, target: TargetDevice, methods: tuple[str, ...] = METHODS) -> list[ModelSize]:
    """Return models that fit a device, planned with a run's length and rank."""
    found = []
    for base in MODEL_SIZES:
        lean = least_memory(run, base)
        planner = Planner(PlannedModel(Model(base=base), "it is one of many"), target)
        forecasts = {method: planner.forecast_as(lean, method) for method in methods}
        # What does not fit does not fit with a larger base either.
        found.append(ModelSize.of(base, planner.base.shapes.total, forecasts))
        methods = tuple(m for m in methods if _needed(forecasts[m]) <= target.budget_bytes)
        if not methods:
            break
    return found


def compare(run: Run, planner: Planner, sizes: Sequence[int] = (16, 24, 48, 80)) -> dict[str, Any]:
    """Compare full fine-tuning, LoRA in 16 bits and QLoRA of a run's base.

    Args:
        run: settings, of which length, rank and modules count.
        planner: planner of its base, on the device for which the longest rows are found.
        sizes: memory of GPUs, in GiB.

    Returns:
        For each method its peak, whether it fits GPUs of the sizes and the largest base that does, the longest row
        (0: none of 1,024 tokens), and the smallest known card (None: none is large enough).
    """
    run = _with_lora(run)
    devices = {size: device_named(f"{size}GiB") for size in sizes}
    models = model_sizes(run, devices[max(sizes)])
    lean = least_memory(run)
    methods = {}
    for method in METHODS:
        forecast = planner.forecast_as(lean, method)
        here = ModelSize.of(run.model.base, 0, {method: forecast})
        largest = {}
        for size, target in devices.items():
            fitting = [model for model in models if model.fits(method, target.budget_bytes)]
            largest[f"{size}GiB"] = fitting[-1].base if fitting else None
        methods[method] = {
            "peak_bytes": forecast.peak_bytes,
            "fits": {f"{size}GiB": here.fits(method, target.budget_bytes) for size, target in devices.items()},
            "largest": largest,
            "longest_row": longest_row(lean, planner, method),
            "smallest_card": smallest_card(lean, planner.base, method, _needed(forecast)),
        }
    assert run.adapter is not None
    about = {"base": run.model.base, "max_length": run.data.max_length, "r": run.adapter.r}
    return about | {"target": planner.target.name, "methods": methods}


def longest_row(run: Run, planner: Planner, method: str) -> int:
    """Return the longest row that a planner's device can train on, rounded down to 1,024 tokens; 0: not even those.

    Args:
        run: settings, with one row at a time.
        planner: planner of its base; the data is not asked.
        method: method of `Planner.forecast_as`.
    """
    base = PlannedModel(run.model, "rows of many lengths are tried")
    positions = base.shapes.positions or LONGEST_ROW
    untimed = Planner(base, replace(planner.target, ceilings=None))  # a time takes dry runs of its own

    def needed_by(count: int) -> int:
        data = run.data.model_copy(update={"max_length": min(count * ROW_STEP, positions), "validation": 0})
        return _needed(untimed.forecast_as(run.model_copy(update={"data": data}), method))

    budget = int(planner.target.budget_bytes / (1 + SPARE))
    return min(positions, ROW_STEP * _most_that_fit(needed_by, max(1, positions // ROW_STEP), budget))


def smallest_card(run: Run, base: PlannedModel, method: str, least_bytes: int) -> str | None:
    """Return the known card with the least memory that a run fits; None: no card is large enough.

    Args:
        run: settings, with one row at a time.
        base: base of the run.
        method: method of `Planner.forecast_as`.
        least_bytes: memory that it needs on some device; others need no less, but perhaps more.
    """
    for card in sorted(CARDS.values(), key=lambda card: (card.memory_bytes, card.name)):
        target = replace(device_named(card.name), ceilings=None)
        if least_bytes * (1 + SPARE) <= target.budget_bytes:
            needed = _needed(Planner(base, target).forecast_as(run, method))
            if needed * (1 + SPARE) <= target.budget_bytes:
                return card.name
    return None


def _needed(forecast: Forecast) -> int:
    """Return the memory of a run; of its training alone, where weights can be streamed and that takes less."""
    return min(forecast.peak_bytes, forecast.streamed_bytes or forecast.peak_bytes)


def _most_that_fit(needed_by: Callable[[int], int], most: int, budget_bytes: int) -> int:
    """Return the largest count up to `most` that fits a budget; 0: not even one does.

    Memory grows almost evenly, so the limit is looked for where a straight line has it: four looks instead of a
    bisection's eight, each of which is a dry run. Every third look halves, whatever the curve.
    """
    low, high = 1, most
    if (below := needed_by(low)) > budget_bytes:
        return 0
    if high == low or (above := needed_by(high)) <= budget_bytes:
        return most
    looks = 0
    while high - low > 1:
        looks += 1
        share = 0.5 if looks % 3 == 0 else (budget_bytes - below) / (above - below)
        count = min(max(low + int(share * (high - low)), low + 1), high - 1)
        needed = needed_by(count)
        if needed <= budget_bytes:
            low, below = count, needed
        else:
            high, above = count, needed
    return low


def smaller_bases(run: Run, planner: Planner) -> Iterator[tuple[str, Planner]]:
    """Yield smaller models of a hub base's own family and kind, the largest first."""
    if find_model(run.model)[0] != "hub":
        return
    for base in smaller_siblings(run.model.base):
        # They share a tokenizer, so rows have the same length.
        smaller = PlannedModel(Model(base=base), planner.base.data)
        if smaller.shapes.total < 0.9 * planner.base.shapes.total:
            yield base, Planner(smaller, planner.target)
