"""Lists the runs under a folder, with the state of each (config/run_state.py): nothing heavy is imported."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError
from veneer.config.run_folder import RunFolder
from veneer.config.run_state import RunState, run_state

DEEPEST = 4  # folders below the one that is named


@dataclass(frozen=True)
class RunList:
    """Runs, the one written last first, and folders that could not be read, with the reason."""

    runs: tuple[RunState, ...]
    skipped: tuple[tuple[str, str], ...]

    def as_dict(self) -> dict[str, Any]:
        skipped = [{"folder": folder, "reason": reason} for folder, reason in self.skipped]
        return {"runs": [asdict(run) for run in self.runs], "skipped": skipped}


def runs(*folders: str | Path) -> RunList:
    """List the runs in and under folders.

    Example:
        for run in veneer.runs("runs").runs:
            print(run.run_dir, run.state, run.step, run.loss)

    Args:
        folders: folders of runs; none: `runs`.

    Raises:
        UserError: A folder does not exist.
    """
    found: dict[Path, RunState] = {}
    skipped: list[tuple[str, str]] = []
    for top in map(Path, folders or ("runs",)):
        if not top.exists():
            raise UserError(f"{top}: no such folder", "name the folder that holds your runs: `veneer runs FOLDER`")
        if not top.is_dir():
            skipped.append((str(top), "not a folder"))
            continue
        for path in _run_folders(top, skipped):
            try:
                found.setdefault(path.resolve(), run_state(path))
            except UserError as error:
                skipped.append((str(path), str(error).splitlines()[0]))
            except OSError as error:
                skipped.append((str(path), error.strerror or type(error).__name__))
    by_time = sorted(found.values(), key=lambda run: (run.last_written, run.run_dir), reverse=True)
    return RunList(tuple(by_time), tuple(skipped))


def _run_folders(top: Path, skipped: list[tuple[str, str]]) -> Iterator[Path]:
    """Yield the folders of runs under a folder; nothing within a run is searched."""

    def cannot_read(error: OSError) -> None:
        skipped.append((str(error.filename), error.strerror or "cannot be read"))

    for name, inside, files in os.walk(top, onerror=cannot_read):
        path = Path(name)
        if "run.yaml" in files or ("environment.json" in files and RunFolder(path).has_environment()):
            inside.clear()
            yield path
        elif len(path.relative_to(top).parts) >= DEEPEST:
            inside.clear()
        else:
            inside[:] = sorted(folder for folder in inside if not folder.startswith("."))
