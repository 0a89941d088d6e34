"""Runs of known models planned for any card, and the changes that make one fit."""

from typing import Any

from veneer.config import Run
from veneer.planning.base import PlannedModel
from veneer.planning.fit import fit
from veneer.planning.model_sizes import smaller_bases
from veneer.planning.planner import Planner
from veneer.planning.target import device_named


def run_of(base: str = "meta-llama/Llama-3.2-1B", **sections: Any) -> Run:
    values: dict[str, Any] = {
        "model": {"base": base},
        "data": {"train": "-", "max_length": 1024, "validation": 0},
        "train": {},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if section is not None else None
    return Run.model_validate(values)


def planner_of(run: Run, gpu: str, lengths: Any = "it is a test") -> Planner:
    return Planner(PlannedModel(run.model, lengths), device_named(gpu))


def kinds(run: Run, gpu: str, lengths: Any = "it is a test") -> tuple[list[str], Run | None]:
    planner = planner_of(run, gpu, lengths)
    found = fit(run, planner, smaller_bases)
    if found is None:
        return [], None
    assert found.forecast.verdict == "fits"
    assert Planner(PlannedModel(found.run.model, lengths), planner.target).forecast(found.run).verdict == "fits"
    return [change.id for change in found.changes], found.run
