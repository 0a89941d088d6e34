"""Veneer: fine-tune large language models with LoRA and QLoRA on the GPU you have, and prove each step.

    import veneer
    run = veneer.Run(model={"base": "smollm2-135m-instruct"}, data={"train": "tickets.jsonl"})
    veneer.train(run)

Everything here is imported when it is first used, so that `import veneer` costs nothing. `veneer.training` is the
function although a package `veneer.training` exists too: importing a package sets an attribute on its parent, and for
these names this module declines. The packages are reached as always: `from veneer.training import TrainingJob`.
"""

from typing import TYPE_CHECKING

from veneer.lazy import import_on_use

if TYPE_CHECKING:
    from veneer.api import (
        certify,
        doctor,
        evaluate,
        export,
        generate,
        inspect_data,
        load,
        merge,
        plan,
        train,
        unmerge,
        verify,
    )
    from veneer.config import JobError, Run, UserError, load_run

__version__ = "0.1.0"

_HOMES = {
    "JobError": "veneer.config",
    "Run": "veneer.config",
    "UserError": "veneer.config",
    "load_run": "veneer.config",
    "certify": "veneer.api",
    "evaluate": "veneer.api",
    "export": "veneer.api",
    "generate": "veneer.api",
    "inspect_data": "veneer.api",
    "doctor": "veneer.api",
    "load": "veneer.api",
    "merge": "veneer.api",
    "plan": "veneer.api",
    "train": "veneer.api",
    "unmerge": "veneer.api",
    "verify": "veneer.api",
}

__all__ = [
    "JobError",
    "Run",
    "UserError",
    "__version__",
    "certify",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "inspect_data",
    "load",
    "load_run",
    "merge",
    "plan",
    "train",
    "unmerge",
    "verify",
]

import_on_use(__name__, _HOMES)
