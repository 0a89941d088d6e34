"""Compares base and tuned model on held-out rows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from veneer.api.load import load_tuned
from veneer.api.suites import Beside, measure_memorisation, measure_suites
from veneer.api.tasks import load_tasks, measure_run_tasks, names_of
from veneer.config import Model, Run, RunFolder, UserError, load_run
from veneer.config.files import read_json
from veneer.config.folder import write_json, write_text
from veneer.config.names import require_run
from veneer.config.notify import kept_in, notify_on_error
from veneer.data.pipeline import HeldOut, prepare, read_held_out
from veneer.data.render import Renderer
from veneer.engine.reference import ReferenceEngine
from veneer.evaluation.compare import Evaluation, Scorer, count_rows, questions, questions_of
from veneer.evaluation.gate import check_gate, parse_gate, require_names
from veneer.evaluation.memory import rows_at_a_time
from veneer.evaluation.metrics import METRICS, choose, require_metrics
from veneer.evaluation.partial import PartialAnswers
from veneer.evaluation.suites import find_suites
from veneer.evaluation.tasks.options import DEFAULT_OPTIONS, TaskOptions
from veneer.machine.device import find_machine
from veneer.model.load import compute_dtype
from veneer.model.tuned import find_tuned
from veneer.planning.batch_shapes import Padded
from veneer.release.certify.judged import judged_by
from veneer.release.publish.card import renew_card

# Names that a gate may hold before the rows are known.
BEGIN_WITH = ("field.", "record")  # of names that only the rows decide


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and where it was written.

    Attributes:
        evaluation: Base against tuned.
        file: File in the run's folder; the answers lie beside it.
        is_record: Whether it is the run's record, evaluation.json: the held-out rows, with the run's own settings.
        beside: results beside the held-out rows: suites, memorisation.
    """

    evaluation: Evaluation
    file: Path
    is_record: bool
    beside: Beside = field(default_factory=Beside)

    @property
    def samples(self) -> Path:
        """The answers, a line a row."""
        return self.file.with_name("samples.jsonl") if self.is_record else self.file.with_suffix(".samples.jsonl")

    @property
    def passed(self) -> bool:
        """Whether every bound of the gate is shown to hold; true without a gate."""
        return all(check.passed for check in self.evaluation.gate)

    def as_dict(self) -> dict[str, Any]:
        return self.evaluation.as_dict() | self.beside.as_dict() | {"file": str(self.file), "is_record": self.is_record}


def evaluate(
    run_dir: str | Path,
    data: str | None = None,
    rows: int | None = None,
    on_done: Callable[[int], None] = lambda done: None,
    force: bool = False,
    base: str | None = None,
    metrics: Sequence[str] | None = None,
    suites: str | None = None,
    memorisation: int | None = None,
    gate: str | None = None,
    tasks: str | None = None,
    task_options: TaskOptions = DEFAULT_OPTIONS,
    *,
    on_begin: Callable[[int], None] = lambda answers: None,
    on_task: Callable[[str, int], None] = lambda task, requests: None,
) -> Evaluated:
    """Compare base and tuned model on a run's held-out rows, or on a file's; written into the run's folder.

    Example:
        evaluated = veneer.evaluate("runs/tickets")

    The run's record (evaluation.json, samples.jsonl, the scores of its card) is of its held-out rows with its own
    settings. Other data, metrics or fewer rows go to a file of their own in evaluations/ and leave the record alone.
    After an interruption the same call goes on with the rows that were not answered.

    Args:
        run_dir: Folder of a finished run.
        data: A file of rows to use instead of the run's held-out rows.
        rows: Largest number of rows; None: as `evaluate.rows` in the run. Pieces of a long text are one row.
        on_done: Callback that gets the number of rows just answered; each row is answered twice.
        force, base: arguments of `load`.
        metrics: Metrics to measure instead of `evaluate.metrics`.
        suites: Names of suites to ask as well, with commas between; `all`: every one (docs/suites.md).
        memorisation: Number of training rows to see whether they come back word for word; None: not measured.
        gate: Condition on what is measured, such as `exact_match >= 0.8`; see docs/comparison.md.
        tasks: Tasks of lm-eval to ask as well: names, folders or files with commas between (docs/tasks.md).
        task_options: Choices that change the scores of tasks.
        on_begin: Callback that gets the number of answers to come, of both models.
        on_task: Callback that gets a task with the model that is asked, and the number of requests to come.

    Raises:
        UserError: No such run, no adapter, no held-out rows, no such suite or task, a metric that is not known or
            that the rows cannot carry, or a gate that is no condition on what is measured.
    """
    wanted = find_suites(suites) if suites is not None else ()
    folder = require_run(str(run_dir))
    condition = None if gate is None else parse_gate(gate)
    found_tasks = load_tasks(tasks, task_options) if tasks is not None else ()
    if condition is not None:
        of_tasks = names_of(found_tasks)
        names = (*METRICS, *(suite.name for suite in wanted), *(("forgetting",) if wanted else ()), *of_tasks)
        filters = (f"{name}." for name in of_tasks)
        require_names(condition, (*names, *map("difference({})".format, names)), (*BEGIN_WITH, *filters))
    with kept_in(folder.events):
        tuned = find_tuned(str(run_dir), base, force)
        assert tuned.run is not None
        run = tuned.run.model_copy(update={"model": tuned.model})
        usual = run.evaluate.rows
        settings = run.evaluate
        if metrics is None:
            require_metrics(settings)
        else:  # settings of the run's own metrics may act on none of these
            settings = settings.model_copy(update={"metrics": "auto" if "auto" in metrics else tuple(metrics)})
        held_out = held_out_rows(folder, run, tuned.renderer, data, rows or usual)
        choose(questions_of(tuned.renderer, held_out, settings))  # refused before the model is loaded
        count = count_rows(held_out)
        is_record = data is None and metrics is None and (rows is None or rows == usual or count < rows)
        loaded = load_tuned(tuned)
        most = (max(len(row.example.ids) for row in held_out), max(row.example.trained for row in held_out))
        at_a_time = rows_at_a_time(run, Padded(len(held_out), *most), loaded.target)
        settings = settings.model_copy(update={"batch_size": at_a_time})
        engine = ReferenceEngine(loaded.model)  # judges by other code than the adapter was trained by
        on_begin(2 * len(questions(held_out)))
        assert loaded.tuned is not None
        partial = PartialAnswers.of_run(folder, loaded.tuned, held_out, settings)
        result = Scorer(loaded.model, engine, loaded.renderer, held_out, settings, partial).compare(on_done)
        beside = Beside()
        if wanted:
            beside = measure_suites(wanted, loaded, engine, result, on_done)
        if memorisation:
            found = measure_memorisation(memorisation, folder, loaded, engine, on_done)
            beside.facts["memorisation"] = found
        if found_tasks:
            parts = (found_tasks, folder, loaded, engine, task_options, rows, at_a_time)
            beside = replace(beside, tasks=measure_run_tasks(*parts, on_begin=on_task, on_done=on_done))
        if condition is not None:
            result = replace(result, gate=check_gate(condition, result.measured() | beside.measured()))
        name = f"{Path(data).name.split('.')[0] if data else 'held-out'}-{count}-rows"
        if is_record and not force:
            evaluated = Evaluated(result, save_evaluation(folder, result, loaded.base, beside), True, beside)
        else:
            evaluated = Evaluated(result, _save_beside(folder, name, result, data, beside), False, beside)
        partial.remove()
        return evaluated


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
    facts = {"judged": judged_by(run, folder.adapter, dtype)}
    write_text(folder.samples, _sample_lines(evaluation))
    if beside.compared:
        write_text(folder.other_evaluations / "suites.samples.jsonl", beside.sample_lines())
    if beside.tasks.compared:
        write_text(folder.other_evaluations / "tasks.samples.jsonl", beside.tasks.sample_lines())
    write_json(folder.evaluation, evaluation.as_dict() | beside.as_dict() | facts)
    notify_on_error("the card", lambda: renew_card(folder, model))
    return folder.evaluation


def _save_beside(folder: RunFolder, name: str, evaluation: Evaluation, data: str | None, beside: Beside) -> Path:
    """Write an evaluation that is not the record under the first free name."""
    number, file = 1, folder.other_evaluations / f"{name}.json"
    while file.exists():
        number += 1
        file = folder.other_evaluations / f"{name}-{number}.json"
    write_text(file.with_suffix(".samples.jsonl"), _sample_lines(evaluation))
    if beside.compared:
        write_text(file.with_suffix(".suites.jsonl"), beside.sample_lines())
    if beside.tasks.compared:
        write_text(file.with_suffix(".tasks.jsonl"), beside.tasks.sample_lines())
    write_json(file, evaluation.as_dict() | beside.as_dict() | {"data": data})
    return file


def _sample_lines(evaluation: Evaluation) -> str:
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples())


def held_out_rows(
    folder: RunFolder, run: Run, renderer: Renderer, data: str | None, limit: int | None
) -> list[HeldOut]:
    """Return the first rows of `data`, or of those that the run held out."""
    if data is not None:
        return read_held_out(data, "--data", run.data, renderer, limit, run.evaluate.group)
    prepared = prepare(run.data, renderer, run.train.seed)
    began = read_json(folder.ledger, "sha256")
    if began["sha256"] != prepared.ledger.sha256:
        raise UserError(
            f"{run.data.train}: its rows are not those of training, so held-out rows may have been trained on",
            "restore the data, or name a file of other rows with --data",
        )
    held_out = prepared.held_out(limit, run.evaluate.group)
    if not held_out:
        share = run.data.validation
        why = f"data.validation = {share}" + (", which is less than one of its rows" if share else "")
        raise UserError(f"the run holds no rows out ({why})", "name a file with --data")
    return held_out
