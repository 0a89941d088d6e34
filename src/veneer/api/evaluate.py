"""Compares a tuned model with its base, or any two targets, on held-out rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from veneer.api.evaluated import Evaluated, save_beside, save_evaluation, save_file
from veneer.api.held_out import held_out_rows
from veneer.api.load import load_tuned
from veneer.api.pairs import Request, compare_targets, gated
from veneer.api.suites import Beside, measure_memorisation, measure_suites
from veneer.api.targets import find_target, require_server
from veneer.api.tasks import load_tasks, measure_run_tasks
from veneer.config import RunFolder, UserError
from veneer.config.names import require_pair, target_kind
from veneer.config.notify import kept_in
from veneer.config.paths import require_path
from veneer.engine.reference import ReferenceEngine
from veneer.evaluation.compare import Scorer, count_rows, questions_of
from veneer.evaluation.gate import parse_gate
from veneer.evaluation.memory import LESS_MEMORY, rows_at_a_time
from veneer.evaluation.metrics import choose
from veneer.evaluation.partial import PartialAnswers, facts_of
from veneer.evaluation.responder import ModelResponder
from veneer.evaluation.suites import find_suites
from veneer.evaluation.tasks.options import DEFAULT_OPTIONS, TaskOptions
from veneer.machine.batching import Batching
from veneer.machine.ranks import join_ranks
from veneer.model.tuned import find_tuned
from veneer.planning.batch_shapes import Padded


def evaluate(
    target: str | Path,
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
    against: str | None = None,
    out: str | Path | None = None,
    model: str | None = None,
    against_model: str | None = None,
    on_begin: Callable[[int], None] = lambda answers: None,
    on_task: Callable[[str, int], None] = lambda task, requests: None,
) -> Evaluated:
    """Compare base and tuned model, or any two targets, on a run's held-out rows, or on a file's.

    Example:
        evaluated = veneer.evaluate("runs/tickets")

    A target is a run, a checkpoint, an adapter, a base, a merged folder, a GGUF file, or the address of an
    OpenAI-compatible server. The run's record (evaluation.json, samples.jsonl, the scores of its card) is of its
    held-out rows with its own settings, base against tuned. Other data, metrics, fewer rows or another target beside
    it go to a file of their own in the run's evaluations/ and leave the record alone.
    After an interruption the same call goes on with the rows that were not answered.

    Args:
        target: Name of what is evaluated.
        data: A file of rows to use instead of the run's held-out rows; needed where no target is a run.
        rows: Largest number of rows; None: as `evaluate.rows` in the run. Pieces of a long text are one row.
        on_done: Callback that gets the number of rows just answered; each row is answered twice.
        force, base: arguments of `load`.
        metrics: Metrics to measure instead of `evaluate.metrics`.
        suites: Names of suites to ask as well, with commas between; `all`: every one (docs/suites.md).
        memorisation: Number of training rows to see whether they come back word for word; None: not measured.
        gate: Condition on what is measured, such as `exact_match >= 0.8`; see docs/comparison.md.
        tasks: Tasks of lm-eval to ask as well: names, folders or files with commas between (docs/tasks.md).
        task_options: Choices that change the scores of tasks.
        against: Target that it is compared with; None: the base of the run or the adapter.
        out: File to write the result to as well.
        model, against_model: Names of models, on servers that have several.
        on_begin: Callback that gets the number of answers to come, of models that are asked one after the other.
        on_task: Callback that gets a task with the model that is asked, and the number of requests to come.

    Raises:
        UserError: No such target, no adapter, no held-out rows, no such suite or task, a metric that is not known or
            that the rows or a target cannot carry, or a gate that is no condition on what is measured.
        JobError: A server gives no usable answer; answers so far are kept.
    """
    ranks = join_ranks()
    require_path(str(target), "name")
    require_server(str(target), require_pair(str(target), against), model, "--model")
    require_server(against, None if against is None else target_kind(against), against_model, "--against-model")
    file = None if out is None else _free_of_records(Path(out).expanduser())
    request = Request(
        *(data, rows, metrics, find_suites(suites) if suites is not None else ()),
        all_suites=suites is not None and suites.strip() == "all",
        condition=None if gate is None else parse_gate(gate),
        on_begin=on_begin,
        on_done=on_done,
        tasks=load_tasks(tasks, task_options) if tasks is not None else (),
        task_options=task_options,
        on_task=on_task,
        ranks=ranks,
    )
    folder = RunFolder(Path(target).expanduser())
    if against is None and folder.run.is_file():
        evaluated = _evaluate_run(str(target), folder, request, force, base, memorisation)
    else:
        if memorisation:
            raise UserError(
                f"--memorisation {memorisation}: it is measured of a run and its base",
                "name a run without --against, or leave it out",
            )
        evaluated = _evaluate_targets(str(target), against, request, force, base, model, against_model)
    if file is not None and ranks.is_first:
        save_file(file, evaluated.evaluation, data, evaluated.beside)
        evaluated = evaluated if evaluated.file is not None else replace(evaluated, file=file)
    ranks.gather(None)  # the others wait until the first one has written all
    return evaluated


def _free_of_records(file: Path) -> Path:
    """Return a file to be written, which is not the record of any run.

    Raises:
        UserError: It is.
    """
    folder = RunFolder(file.absolute().parent)
    if file.absolute() == folder.evaluation and folder.run.is_file():
        raise UserError(f"--out {file}: it is the record of a run", "name another file")
    return file


def _evaluate_targets(
    target: str,
    against: str | None,
    request: Request,
    force: bool,
    base: str | None,
    model: str | None,
    against_model: str | None,
) -> Evaluated:
    """Compare two targets, or an adapter that is no run's with its base; written beside a run's record, if any."""
    found = find_target(target, base, force, model)
    other = None if against is None else find_target(against, model=against_model, option="--against-model")
    served = next((one.name for one in (found, other) if one is not None and not one.has_losses), None)
    if request.ranks.size > 1 and served is not None:
        raise UserError(
            f"{served}: it is run by a server, and {request.ranks.size} processes would ask the same one",
            "leave --gpus out",
        )
    result, beside, name = compare_targets(found, other, request)
    folder = found.tuned.folder if found.tuned is not None else None
    file = None
    if folder is not None and request.ranks.is_first:
        file = save_beside(folder, name, result, request.data, beside)
    return Evaluated(result, file, False, beside)


def _evaluate_run(
    name: str, folder: RunFolder, request: Request, force: bool, base: str | None, memorisation: int | None
) -> Evaluated:
    """Compare base and tuned model of a run, from one loaded model."""
    with kept_in(folder.events):
        tuned = find_tuned(name, base, force)
        assert tuned.run is not None
        run = tuned.run.model_copy(update={"model": tuned.model})
        usual, rows, data = run.evaluate.rows, request.rows, request.data
        settings = request.settings(run.evaluate)
        held_out = held_out_rows(folder, run, tuned.renderer, data, rows or usual)
        chosen = choose(questions_of(tuned.renderer, held_out, settings))  # refused before the model is loaded
        request.require_gate_names(chosen.names)
        count = count_rows(held_out)
        is_record = data is None and request.metrics is None and (rows is None or rows == usual or count < rows)
        loaded = load_tuned(tuned)
        most = (max(len(row.example.ids) for row in held_out), max(row.example.trained for row in held_out))
        at_a_time = rows_at_a_time(run, Padded(len(held_out), *most), loaded.target)
        ranks = request.ranks
        # It judges by other code than the adapter was trained by.
        engine = ReferenceEngine(loaded.model, load_base=tuned.load_base)
        request.on_begin(2 * request.answers(held_out, request.suites))
        partial = PartialAnswers.of_rows(folder.other_evaluations, facts_of(tuned), held_out, settings, ranks)
        batching = Batching(at_a_time, LESS_MEMORY, ranks=ranks)
        responder = ModelResponder(loaded.model, engine, loaded.renderer, batching)
        result = Scorer(responder, held_out, settings, partial, chosen).compare(engine.adapter_off, request.on_done)
        beside = Beside()
        if request.suites:
            beside = measure_suites(request.suites, loaded, engine, result, request.on_done, ranks)
        if memorisation:
            told = (request.on_begin, request.on_done)
            beside.facts["memorisation"] = measure_memorisation(memorisation, folder, loaded, engine, *told, ranks)
        if not ranks.is_first:
            return Evaluated(result, None, False, beside)
        if request.tasks:
            measured = measure_run_tasks(
                *(request.tasks, folder, loaded, engine, request.task_options, rows, at_a_time),
                on_begin=request.on_task,
                on_done=request.on_done,
            )
            beside = replace(beside, tasks=measured)
        result = gated(request, result, beside)
        if is_record and not force:
            evaluated = Evaluated(
                result, save_evaluation(folder, result, tuned.trained_from or loaded.base, beside), True, beside
            )
        else:
            file = save_beside(folder, request.file_name(count), result, data, beside)
            evaluated = Evaluated(result, file, False, beside)
        partial.remove()
        return evaluated
