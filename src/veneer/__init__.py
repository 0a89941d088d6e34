"""Veneer: fine-tune large language models with LoRA and QLoRA on the GPU you have, and prove each step.

    import veneer
    run = veneer.Run(model={"base": "smollm2-135m-instruct"}, data={"train": "tickets.jsonl"})
    veneer.train(run)

docs/python.md shows the rest. Everything here is imported when it is first used, so `import veneer` costs nothing.
"""

from typing import TYPE_CHECKING

from veneer.lazy import import_on_use

if TYPE_CHECKING:
    from veneer.api.certify import certify
    from veneer.api.doctor import doctor
    from veneer.api.evaluate import evaluate
    from veneer.api.export import export
    from veneer.api.generate import generate
    from veneer.api.load import load
    from veneer.api.merge import merge, unmerge
    from veneer.api.plan import plan
    from veneer.api.prepare import prepare
    from veneer.api.push import push
    from veneer.api.train import train
    from veneer.config import JobError, Run, UserError, load_run
    from veneer.config.sampling import Sampling
    from veneer.training.verify import verify

__version__ = "0.1.0"

__all__ = [
    "JobError",
    "Run",
    "Sampling",
    "UserError",
    "__version__",
    "certify",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "load",
    "load_run",
    "merge",
    "plan",
    "prepare",
    "push",
    "train",
    "unmerge",
    "verify",
]

__getattr__ = import_on_use(
    __name__,
    {
        "JobError": "veneer.config",
        "Run": "veneer.config",
        "Sampling": "veneer.config.sampling",
        "UserError": "veneer.config",
        "certify": "veneer.api.certify",
        "doctor": "veneer.api.doctor",
        "evaluate": "veneer.api.evaluate",
        "export": "veneer.api.export",
        "generate": "veneer.api.generate",
        "load": "veneer.api.load",
        "load_run": "veneer.config",
        "merge": "veneer.api.merge",
        "plan": "veneer.api.plan",
        "prepare": "veneer.api.prepare",
        "push": "veneer.api.push",
        "train": "veneer.api.train",
        "unmerge": "veneer.api.merge",
        "verify": "veneer.training.verify",
    },
)
