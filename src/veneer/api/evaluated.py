"""An evaluation with what was measured beside it, and the files that it is written to."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.api.live_page import renew_page
from veneer.api.suites import Beside
from veneer.config import Model, RunFolder, UserError, load_run
from veneer.config.files import read_json
from veneer.config.folder import write_json, write_text
from veneer.config.notify import notify_on_error
from veneer.evaluation.compare import Evaluation
from veneer.machine.device import find_machine
from veneer.model.load import compute_dtype
from veneer.release.certify.judged import judged_by
from veneer.release.publish.card import renew_card


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and where it was written.

    Attributes:
        evaluation: Base against tuned, or one target against another.
        file: File that it was written to; the answers lie beside it. None: it is written nowhere.
        is_record: Whether it is the run's record, evaluation.json: the held-out rows, with the run's own settings.
        beside: results beside the held-out rows: suites, memorisation.
    """

    evaluation: Evaluation
    file: Path | None
    is_record: bool
    beside: Beside = field(default_factory=Beside)

    @property
    def samples(self) -> Path | None:
        """The answers, a line a row."""
        if self.file is None:
            return None
        return self.file.with_name("samples.jsonl") if self.is_record else self.file.with_suffix(".samples.jsonl")

    @property
    def passed(self) -> bool:
        """Whether every bound of the gate is shown to hold; true without a gate."""
        return all(check.passed for check in self.evaluation.gate)

    def as_dict(self) -> dict[str, Any]:
        file = None if self.file is None else str(self.file)
        return self.evaluation.as_dict() | self.beside.as_dict() | {"file": file, "is_record": self.is_record}


def save_evaluation(
    folder: RunFolder, evaluation: Evaluation, model: Model | None = None, beside: Beside | None = None
) -> Path:
    """Write the run's record: evaluation.json and samples.jsonl, and the scores into the adapter's card.

    Args:
        folder: Folder of the run.
        evaluation: Scores and answers.
        model: The base, where it is not where the run says.
        beside: results beside the held-out rows.
    """
    beside = beside or Beside()
    run = load_run(folder.run)
    dtype = compute_dtype(run.model, find_machine())
    facts = {"judged": judged_by(run, folder.delivered, dtype)}
    kept = _kept(folder, facts, _sample_lines(evaluation))
    write_text(folder.samples, _sample_lines(evaluation))
    if beside.compared:
        write_text(folder.other_evaluations / "suites.samples.jsonl", beside.sample_lines())
    if beside.tasks.compared:
        write_text(folder.other_evaluations / "tasks.samples.jsonl", beside.tasks.sample_lines())
    write_json(folder.evaluation, evaluation.as_dict() | kept | beside.as_dict() | facts)
    notify_on_error("the card", lambda: renew_card(folder, model))
    renew_page(folder)
    return folder.evaluation


def _kept(folder: RunFolder, facts: dict[str, Any], answers: str) -> dict[str, Any]:
    """Return what an earlier evaluation of this very model measured beside the rows, and win rates of these answers."""
    if not folder.evaluation.is_file():
        return {}
    try:
        earlier = read_json(folder.evaluation)
    except UserError:  # damaged: it is replaced
        return {}
    if earlier.get("judged") != facts["judged"]:
        return {}
    keys = ["suites", "memorisation", "personal", "tasks"]
    if folder.samples.is_file() and folder.samples.read_bytes() == answers.encode(errors="backslashreplace"):
        keys.append("win_rates")
    return {key: earlier[key] for key in keys if key in earlier}


def save_beside(folder: RunFolder, name: str, evaluation: Evaluation, data: str | None, beside: Beside) -> Path:
    """Write an evaluation that is not the record under the first free name."""
    number, file = 1, folder.other_evaluations / f"{name}.json"
    while file.exists():
        number += 1
        file = folder.other_evaluations / f"{name}-{number}.json"
    return save_file(file, evaluation, data, beside)


def save_file(file: Path, evaluation: Evaluation, data: str | None, beside: Beside) -> Path:
    """Write an evaluation with its answers beside it."""
    write_text(file.with_suffix(".samples.jsonl"), _sample_lines(evaluation))
    if beside.compared:
        write_text(file.with_suffix(".suites.jsonl"), beside.sample_lines())
    if beside.tasks.compared:
        write_text(file.with_suffix(".tasks.jsonl"), beside.tasks.sample_lines())
    write_json(file, evaluation.as_dict() | beside.as_dict() | {"data": data})
    return file


def _sample_lines(evaluation: Evaluation) -> str:
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples())
