"""What a run is: its settings, its folder on disk, and the errors a user can cause.

`run.py` holds the settings with their defaults, `load.py` reads them from YAML, `folder.py` names the files
of a run and writes them whole or not at all, `errors.py` has the exceptions that reach a user. `names.py`,
`options.py`, `sampling.py`, `prompts.py` and `hub.py` hold what a command can check before it imports any library,
and `foreign.py` what other tools call a setting.
"""

from veneer.config.errors import Interrupted, JobError, UserError
from veneer.config.folder import RunFolder
from veneer.config.load import load_run, run_of
from veneer.config.run import Adapter, Data, Evaluate, Model, Quantization, Run, Train

__all__ = [
    "Adapter",
    "Data",
    "Evaluate",
    "Interrupted",
    "JobError",
    "Model",
    "Quantization",
    "Run",
    "RunFolder",
    "Train",
    "UserError",
    "load_run",
    "run_of",
]
