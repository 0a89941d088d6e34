"""Veneer: fine-tune large language models with LoRA and QLoRA on the GPU you have, and prove each step.

    import veneer
    run = veneer.Run(model={"base": "smollm2-135m-instruct"}, data={"train": "tickets.jsonl"})
    veneer.train(run)

docs/python.md shows the rest. Everything here is imported when it is first used, so `import veneer` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.api.certify import certify
    from veneer.api.chat import chat
    from veneer.api.doctor import doctor
    from veneer.api.evaluate import evaluate
    from veneer.api.evaluate_classifier import evaluate_classifier
    from veneer.api.export import export
    from veneer.api.generate import generate
    from veneer.api.judge import judge
    from veneer.api.load import load
    from veneer.api.merge import merge, unmerge
    from veneer.api.plan import plan
    from veneer.api.predict import predict
    from veneer.api.prepare import prepare
    from veneer.api.push import push
    from veneer.api.report import write_report
    from veneer.api.runs import runs
    from veneer.api.serve import serve
    from veneer.api.sweep import sweep
    from veneer.api.train import train
    from veneer.api.watch import watch
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
    "chat",
    "doctor",
    "evaluate",
    "evaluate_classifier",
    "export",
    "generate",
    "judge",
    "load",
    "load_run",
    "merge",
    "plan",
    "predict",
    "prepare",
    "push",
    "runs",
    "serve",
    "sweep",
    "train",
    "unmerge",
    "verify",
    "watch",
    "write_report",
]
_NOT_IN_API = {
    **dict.fromkeys(("JobError", "Run", "UserError", "load_run"), "veneer.config"),
    "Sampling": "veneer.config.sampling",
    "unmerge": "veneer.api.merge",
    "verify": "veneer.training.verify",
    "write_report": "veneer.api.report",  # veneer.report is the package of pages
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'veneer' has no attribute {name!r}")
        return getattr(importlib.import_module(_NOT_IN_API.get(name, f"veneer.api.{name}")), name)
