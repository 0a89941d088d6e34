"""Finds the bases that a given amount of memory can train, from 0.1B to 72B, by method.

Each is planned with the least memory: one row at a time, activations recomputed, 8-bit optimizer, adapters on all
linear layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.config import Model, Run
from veneer.config.names import find_model
from veneer.model.known import MODEL_SIZES, smaller_siblings
from veneer.planning.base import PlannedModel
from veneer.planning.held_out import SPARE
from veneer.planning.planner import Planner
from veneer.planning.target import TargetDevice, device_named

METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class ModelSize:
    """A base and the memory its training needs.

    Attributes:
        base: hub id.
        parameters: number of its parameters.
        peak_bytes: peak of training, by method; methods that did not fit with a smaller base are left out.
    """

    base: str
    parameters: int
    peak_bytes: dict[str, int]

    def best(self, budget_bytes: int) -> str | None:
        """Return the best method that fits with memory left over: full before lora before qlora."""
        return next((m for m in METHODS if self.fits(m, budget_bytes)), None)

    def fits(self, method: str, budget_bytes: int) -> bool:
        return method in self.peak_bytes and self.peak_bytes[method] * (1 + SPARE) <= budget_bytes


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
        values["adapter"] |= {"target_modules": "all-linear"}
    return Run.model_validate(values)


def model_sizes(run: Run, target: TargetDevice, methods: tuple[str, ...] = METHODS) -> list[ModelSize]:
    """Return models that fit a device, planned with a run's length and rank."""
    found = []
    for base in MODEL_SIZES:
        lean = least_memory(run, base)
        planner = Planner(PlannedModel(Model(base=base), "it is one of many"), target)
        forecasts = {method: planner.forecast_as(lean, method) for method in methods}
        # What does not fit does not fit with a larger base either.
        found.append(ModelSize(base, planner.base.shapes.total, {m: forecasts[m].peak_bytes for m in methods}))
        methods = tuple(m for m in methods if forecasts[m].peak_bytes <= target.budget_bytes)
        if not methods:
            break
    return found


def compare(run: Run, planner: Planner, sizes: Sequence[int] = (16, 24, 48, 80)) -> dict[str, Any]:
    """Compare full fine-tuning, LoRA in 16 bits and QLoRA of a run's base, and the largest base that each can train.

    Args:
        run: settings, of which length and rank count.
        planner: planner of its base.
        sizes: memory of GPUs, in GiB.
    """
    devices = {size: device_named(f"{size}GiB") for size in sizes}
    models = model_sizes(run, devices[max(sizes)])
    lean = least_memory(run)
    methods = {}
    for method in METHODS:
        peak = planner.forecast_as(lean, method).peak_bytes
        here = ModelSize(run.model.base, 0, {method: peak})
        largest = {}
        for size, target in devices.items():
            fitting = [model for model in models if model.fits(method, target.budget_bytes)]
            largest[f"{size}GiB"] = fitting[-1].base if fitting else None
        methods[method] = {
            "peak_bytes": peak,
            "fits": {f"{size}GiB": here.fits(method, target.budget_bytes) for size, target in devices.items()},
            "largest": largest,
        }
    return {"base": run.model.base, "max_length": run.data.max_length, "r": run.adapter.r, "methods": methods}


def smaller_bases(run: Run, planner: Planner) -> Iterator[tuple[str, Planner]]:
    """Yield smaller models of a hub base's own family and kind, the largest first."""
    if find_model(run.model)[0] != "hub":
        return
    for base in smaller_siblings(run.model.base):
        # They share a tokenizer, so rows have the same length.
        smaller = PlannedModel(Model(base=base), planner.base.data)
        if smaller.shapes.total < 0.9 * planner.base.shapes.total:
            yield base, Planner(smaller, planner.target)
