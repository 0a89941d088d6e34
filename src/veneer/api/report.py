"""Makes the page of a run anew, or one page of several runs side by side; from their folders alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError
from veneer.config.folder import write_text
from veneer.config.run_folder import RunFolder
from veneer.report.run_files import read_run
from veneer.report.run_page import run_page
from veneer.report.runs_page import MOST_RUNS, runs_page

TOGETHER = "report.html"  # of several runs, in the folder one is in


@dataclass(frozen=True)
class Report:
    """A page that was written.

    Attributes:
        file: the page.
        runs: folders of the runs on it.
        damaged: sentences on files and lines that could not be read; the page shows the rest.
    """

    file: Path
    runs: tuple[Path, ...]
    damaged: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"file": str(self.file), "runs": [str(run) for run in self.runs], "damaged": list(self.damaged)}


def write_report(*runs: str | Path, out: str | Path | None = None) -> Report:
    """Write the page of a run, or of several side by side.

    Example:
        print(veneer.write_report("runs/tickets").file)

    Args:
        runs: folders of runs; several make one page that compares them.
        out: file to write; None: report.html, in the run's folder or, of several, in the working folder.

    Raises:
        UserError: None is named, too many are, or one is no run.
    """
    folders = tuple(dict.fromkeys(Path(run).expanduser() for run in runs))
    if not folders:
        raise UserError(
            "no run is named", "name the folder of a run: `veneer report runs/NAME`; `veneer runs` lists them"
        )
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs, and a page compares at most {MOST_RUNS}", "name fewer of them")
    damaged = [(folder, read_run(folder).damaged) for folder in folders]
    page = run_page(folders[0]) if len(folders) == 1 else runs_page(folders)
    file = Path(out).expanduser() if out is not None else _usual(folders)
    if file.is_dir():
        raise UserError(f"--out {file}: is a folder", "name a file, such as runs.html")
    try:
        write_text(file, page)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})", "name another file with --out") from None
    return Report(file, folders, tuple(f"{folder}: {one}" for folder, told in damaged for one in told))


def _usual(folders: tuple[Path, ...]) -> Path:
    return RunFolder(folders[0]).report if len(folders) == 1 else Path(TOGETHER)
