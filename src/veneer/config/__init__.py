"""Defines what a run is: its settings, its folder on disk, and the errors a user can cause.

`run.py`, `adapter.py` and `objectives.py` hold the settings with their defaults, `load.py` reads them from YAML,
`run_folder.py` names the files of a run, `folder.py` writes files and folders whole or not at all, `errors.py` has the
exceptions that reach a user.
`names.py`, `paths.py`, `address.py`, `options.py`, `sampling.py`, `prompts.py` and `hub.py` hold what a command can
check before it imports any library, and `foreign.py` what other tools call a setting.
"""

from veneer.config.adapter import Adapter
from veneer.config.errors import Interrupted, JobError, UserError
from veneer.config.load import load_run, run_of
from veneer.config.objectives import OF_PAIRS, Cpo, Dpo, Kto, Orpo, Simpo
from veneer.config.run import Data, EarlyStopping, Evaluate, Model, Quantization, Run, Train
from veneer.config.run_folder import RunFolder

__all__ = [
    "OF_PAIRS",
    "Adapter",
    "Cpo",
    "Data",
    "Dpo",
    "EarlyStopping",
    "Evaluate",
    "Interrupted",
    "JobError",
    "Kto",
    "Model",
    "Orpo",
    "Quantization",
    "Run",
    "RunFolder",
    "Simpo",
    "Train",
    "UserError",
    "load_run",
    "run_of",
]
