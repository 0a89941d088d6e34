"""Examines this machine: what is wrong with it, and what fits it."""

from dataclasses import asdict, dataclass
from typing import Any

from veneer.config import Run
from veneer.machine.link import measure_link
from veneer.machine.speeds import Ceilings, save_ceilings, save_link
from veneer.model.known import MODEL_SIZES
from veneer.model.lineage import builtin_origins
from veneer.planning.doctor import MachineProblem, MachineReport, diagnose, examine_machine, usable, with_link
from veneer.planning.model_sizes import METHODS, ModelSize, model_sizes
from veneer.planning.target import this_device


@dataclass(frozen=True)
class Examined:
    """A machine, what is broken on it, and what it can train.

    Attributes:
        found: Description of the machine.
        problems: Problems and their fixes.
        trains: Common bases from small to large, with the memory each method needs.
        budget_bytes: Memory that a run may use here.
    """

    found: MachineReport
    problems: list[MachineProblem]
    trains: list[ModelSize]
    budget_bytes: int
    ceilings: Ceilings | None

    def as_dict(self) -> dict[str, Any]:
        return self.found.as_dict() | {
            "usable": [asdict(part) for part in usable(self.found)],
            "problems": [asdict(problem) for problem in self.problems],
            "budget_bytes": self.budget_bytes,
            "trains": [
                asdict(model)
                | {
                    "best": model.best(self.budget_bytes),
                    "streamed": [method for method in METHODS if model.streams(method, self.budget_bytes)],
                }
                for model in self.trains
            ],
            "ceilings": self.ceilings and asdict(self.ceilings),
            "builtin": {
                name: f"dequantized to bfloat16 from {file.describe()}; {file.caution()}"
                for name, file in builtin_origins().items()
            },
        }


def doctor(measure: bool = False) -> Examined:
    """Examine this machine; where it has several GPUs, measure the link between them for the times of later plans.

    Args:
        measure: Measure its speed too, for the times of later plans; takes about 20 seconds.
    """
    found = with_link(examine_machine(), measure_link)
    if found.gpu_link is not None:
        save_link(found.machine, len(found.gpus), found.gpu_link)
    if measure:
        from veneer.planning.measure import measure_ceilings

        save_ceilings(found.machine, measure_ceilings(found.machine))
    target = this_device(found.machine)
    usual = Run.model_validate({"model": {"base": MODEL_SIZES[0]}, "data": {"train": "-"}})
    trains = model_sizes(usual, target, ("lora", "qlora"))
    return Examined(found, diagnose(found), trains, target.budget_bytes, target.ceilings)
