"""A process that measures trials of a sweep: `python -m veneer.api.trial_process SWEEP.YAML`; see api/sweep.py."""

import sys
from pathlib import Path

from veneer.api.train import finish
from veneer.config.notify import collected
from veneer.config.sweep import load_sweep
from veneer.evaluation.sweep import trials_of
from veneer.evaluation.trial_processes import serve_trials
from veneer.evaluation.trials import Trials


def main(file: Path) -> int:
    """Measure the trials of a sweep that standard input names; returns the exit status."""
    planned = load_sweep(file)
    trials = Trials(planned, planned.sweep.output_dir.expanduser(), finish)
    with collected():
        return serve_trials(trials, {trial.name: trial for trial in trials_of(planned)})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
