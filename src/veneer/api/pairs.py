"""Compares two targets on the same rows: one is loaded, answers and goes, and then the other."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.api.held_out import held_out_rows
from veneer.api.suites import Beside, beside_of
from veneer.api.targets import Target, Workload
from veneer.api.tasks import MeasuredTasks, measure_tasks, names_of
from veneer.config import Data, Evaluate, UserError
from veneer.config.cache import cache_folder
from veneer.config.notify import kept_in, notify
from veneer.data.held_out import read_conversations, render_for
from veneer.data.pipeline import HeldOut, prepare, read_held_out
from veneer.evaluation.compare import Evaluation, Score, Scorer, count_rows, groups_of, questions, questions_of
from veneer.evaluation.gate import Condition, check_gate, require_names
from veneer.evaluation.metrics import choose, require_metrics
from veneer.evaluation.metrics.choose import ChosenMetrics
from veneer.evaluation.partial import PartialAnswers
from veneer.evaluation.responder import ModelResponder, Responder
from veneer.evaluation.suites import ABILITIES, FORGETTING, Suite
from veneer.evaluation.suites.compare import SuiteScore, answer_suites, pair_suites
from veneer.evaluation.tasks.options import DEFAULT_OPTIONS, TaskOptions
from veneer.machine.device import release_memory
from veneer.machine.ranks import ALONE, Ranks

# Results of metrics that have several; those of FIELDS have a key of the rows behind it.
RESULTS = {"json_fields": ("record", "valid_json"), "tool_calls": ("tool_calls", "tool_names")}
FIELDS = "field."


@dataclass(frozen=True)
class Request:
    """What an evaluation was asked for; attributes as the arguments of `evaluate`.

    Attributes:
        all_suites: Whether suites are all of them, so that one may be left out.
        condition: The gate, parsed.
        ranks: This process among those that share the rows; tasks and the gate are the first one's.
    """

    data: str | None
    rows: int | None
    metrics: Sequence[str] | None
    suites: Sequence[Suite]
    all_suites: bool
    condition: Condition | None
    on_begin: Callable[[int], None]
    on_done: Callable[[int], None]
    tasks: Sequence[Any] = ()
    task_options: TaskOptions = DEFAULT_OPTIONS
    on_task: Callable[[str, int], None] = lambda task, requests: None
    ranks: Ranks = ALONE

    @property
    def is_named(self) -> bool:
        """Whether the caller names metrics."""
        return self.metrics is not None and "auto" not in self.metrics

    def settings(self, usual: Evaluate) -> Evaluate:
        """Return the settings of an evaluation with the metrics that are asked for.

        Raises:
            UserError: A metric of the usual settings is not known or not installed.
        """
        if self.metrics is None:
            require_metrics(usual)
            return usual
        # Settings of the run's own metrics may act on none of these.
        return usual.model_copy(update={"metrics": tuple(self.metrics) if self.is_named else "auto"})

    def require_gate_names(self, metrics: Sequence[str], suites: Sequence[Suite] | None = None) -> None:
        """Raise UserError where the gate names what is not measured.

        Args:
            metrics: Names of the metrics.
            suites: Suites that are asked; None: those of the request.
        """
        if self.condition is None:
            return
        suites = self.suites if suites is None else suites
        of_tasks = names_of(self.tasks)
        names = [result for metric in metrics for result in RESULTS.get(metric, (metric,))]
        names += [*(suite.name for suite in suites), *of_tasks]
        known = [*names, *map("difference({})".format, names)]
        known += [FORGETTING] if any(suite in ABILITIES for suite in suites) else []
        beginnings = (*([FIELDS] if "json_fields" in metrics else []), *(f"{name}." for name in of_tasks))
        require_names(self.condition, known, beginnings)

    def answers(self, held_out: Sequence[HeldOut], suites: Sequence[Suite]) -> int:
        """Return the number of answers that one model gives to rows and suites."""
        return len(questions(held_out)) + sum(len(suite.items) for suite in suites)

    def file_name(self, count: int, against: str | None = None) -> str:
        """Return the name of a file of its results, without the ending."""
        name = f"{Path(self.data).name.split('.')[0] if self.data else 'held-out'}-{count}-rows"
        if against is None:
            return name
        plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in Path(against).name)
        return f"{name}-against-{plain[:40]}"


def gated(request: Request, result: Evaluation, beside: Beside) -> Evaluation:
    """Return the evaluation with the checks of the gate that was asked for."""
    if request.condition is None or not request.ranks.is_first:
        return result
    return replace(result, gate=check_gate(request.condition, result.measured() | beside.measured()))


def compare_targets(target: Target, against: Target | None, request: Request) -> tuple[Evaluation, Beside, str]:
    """Compare two targets on the same rows by the same metrics, verdicts and suites.

    Args:
        target: The target that is evaluated; it stands where a run's tuned model does.
        against: The target that it is compared with, in the base's place; None: the adapter's own base.
        request: Rows, metrics, suites and gate that were asked for.

    Returns:
        The comparison, what was measured beside the rows, and a name for the file of both.

    Raises:
        UserError: There are no rows, or a target cannot give a metric or a suite that was named.
        JobError: A server gives no usable answer; answers so far are kept.
    """
    sides = [target] if against is None else [against, target]
    runs = [side.tuned for side in reversed(sides) if side.tuned is not None]
    folder = target.tuned.folder if target.tuned is not None else None
    keeping: AbstractContextManager[Any] = nullcontext() if folder is None else kept_in(folder.events)
    with keeping:
        settings = request.settings(next((run.run.evaluate for run in runs if run.run is not None), Evaluate()))
        rows = _Rows(sides, request, settings)
        if request.data is None:
            _look_for_training_rows(sides, rows)
        chosen = _choose_for_both(rows, sides, settings, request)
        suites = _suites_of_both(sides, request)
        _require_tasks(sides, request)
        request.require_gate_names(chosen.names, suites)
        kept = (folder.other_evaluations if folder is not None else cache_folder() / "evaluations", settings, chosen)
        if against is None:
            result, asked, tasks, partials = _with_own_base(target, rows, suites, request, kept)
        else:
            scores, asked, of_tasks, partials = [], [], [], []
            for side, place in zip(sides, ("base", "tuned"), strict=True):
                score, answers, measured, partial = _scored(side, place, rows, suites, request, kept)
                release_memory()
                scores.append(score)
                asked.append(answers)
                of_tasks.append(measured)
                partials.append(partial)
            tasks = of_tasks[1].against(of_tasks[0], settings.equal_within)
            base, tuned = scores
            result = Evaluation(base, tuned, groups=groups_of(rows.read), equal_within=settings.equal_within)
        beside = replace(beside_of(pair_suites(*asked), result) if suites else Beside(), tasks=tasks)
        other = against.name if against is not None else "its base"
        beside.facts["compared"] = {"base": other, "tuned": target.name}
        result = gated(request, result, beside)
        for partial in partials if request.ranks.is_first else ():
            partial.remove()
        return result, beside, request.file_name(count_rows(rows.read), None if against is None else other)


Kept = tuple[Path, Evaluate, ChosenMetrics]  # folder of answers that are kept, settings, metrics


class _Rows:
    """The rows of a comparison, read once, and as each of its local models makes tokens of them.

    Attributes:
        read: The rows as they were read.
        reader: Renderer that read them; None: all models are on servers.
        renderers: Renderer of each side, by its place among them; None: it is on a server.
    """

    def __init__(self, sides: Sequence[Target], request: Request, settings: Evaluate) -> None:
        tuned = [side.tuned for side in reversed(sides) if side.tuned is not None]
        self._data = next((found.data for found in tuned if found.data is not None), Data(train=request.data or "-"))
        self.renderers = {side: side.renderer(self._data) for side in sides}
        self.reader = next((found for side in reversed(sides) if (found := self.renderers[side]) is not None), None)
        limit = request.rows or settings.rows
        if request.data is None:
            owner = next((found for found in tuned if found.run is not None and found.folder is not None), None)
            if owner is None:
                raise UserError("no target is a run, so there are no held-out rows", "name a file with --data")
            assert owner.run is not None
            assert owner.folder is not None
            self.reader = owner.renderer
            self.read = held_out_rows(owner.folder, owner.run, owner.renderer, None, limit)
        elif self.reader is not None:
            self.read = read_held_out(request.data, "--data", self._data, self.reader, limit, settings.group)
        else:
            self.read = read_conversations(request.data, "--data", self._data, limit, settings.group)

    def of(self, side: Target) -> list[HeldOut]:
        """Return the rows as a side's own renderer makes tokens of them."""
        renderer = self.renderers[side]
        if renderer is None or renderer is self.reader:
            return self.read
        return render_for(renderer, self.read, self._data.max_length)

    @property
    def has_one_tokenizer(self) -> bool:
        """Whether all models make the same tokens of a text, as far as is known."""
        return len({found.fingerprint for found in self.renderers.values() if found is not None}) < 2


def _look_for_training_rows(sides: Sequence[Target], rows: _Rows) -> None:
    """Notify where one run was trained on rows that the other one holds out: its score shows its memory."""
    for side in sides:
        found = side.tuned
        if found is None or found.run is None or found.folder is None or found.renderer is rows.reader:
            continue
        try:
            known = prepare(found.run.data, found.renderer, found.run.train.seed).trained_rows(rows.read)
        except UserError as error:
            notify(f"{side.name}: whether it was trained on these rows is not known: {str(error).splitlines()[0]}")
            continue
        if known:
            notify(
                f"{side.name} was trained on {len(known)} of the {count_rows(rows.read)} rows ({known[0]}), so its "
                "score shows its memory as well; name a file that neither was trained on with --data",
                where="--against",
            )


def _choose_for_both(rows: _Rows, sides: Sequence[Target], settings: Evaluate, request: Request) -> ChosenMetrics:
    """Return the metrics that all sides can give; others are left out with a notice.

    Raises:
        UserError: One that was named cannot be given, or none is left.
    """
    chosen = choose(questions_of(rows.reader, rows.read, settings))
    served = [side.name for side in sides if not side.has_losses]
    left_out = {}
    for metric in chosen.metrics:
        if metric.reads != "answers" and served:
            left_out[metric.name] = f"it reads losses, which {' and '.join(served)} cannot give"
        elif metric.name == "perplexity" and not rows.has_one_tokenizer:
            left_out[metric.name] = "the tokenizers differ, so perplexities do not compare; bits_per_byte does"
    kept = tuple(metric for metric in chosen.metrics if metric.name not in left_out)
    for name, why in left_out.items():
        if request.is_named or not kept:
            raise UserError(f"{name}: {why}", "name other metrics with --metrics")
        notify(f"{name} is left out: {why}", where="evaluate.metrics")
    return ChosenMetrics(kept, chosen.why)


def _suites_of_both(sides: Sequence[Target], request: Request) -> list[Suite]:
    """Return the suites that all sides can be asked; one by choice is left out with a notice where there are all.

    Raises:
        UserError: One that was named cannot be asked.
    """
    served = [side.name for side in sides if not side.has_losses]
    by_choice = [suite.name for suite in request.suites if suite.by_choice] if served else []
    for name in by_choice:
        why = f"{name}: it reads losses, which {' and '.join(served)} cannot give"
        if not request.all_suites:
            raise UserError(why, "leave that suite out")
        notify(f"{why}; it is left out", where="--suites")
    return [suite for suite in request.suites if suite.name not in by_choice]


def _scored(
    side: Target, place: str, rows: _Rows, suites: Sequence[Suite], request: Request, kept: Kept
) -> tuple[Score, list[SuiteScore], MeasuredTasks, PartialAnswers]:
    """Let one side answer rows, suites and tasks."""
    folder, settings, chosen = kept
    held_out = rows.of(side)
    partial = PartialAnswers.of_rows(folder, side.facts(), held_out, settings, request.ranks)
    with side.open(rows.renderers[side], Workload(held_out, settings, suites, rows.reader, request.ranks)) as responder:
        request.on_begin(request.answers(held_out, suites))
        scorer = Scorer(responder, held_out, settings, partial, chosen)
        score = scorer.score(request.on_done, kept=scorer.kept(place))
        answers = answer_suites(suites, responder, request.on_done)
        return score, answers, _tasks_of(responder, request, settings), partial


def _with_own_base(
    side: Target, rows: _Rows, suites: Sequence[Suite], request: Request, kept: Kept
) -> tuple[Evaluation, list[list[SuiteScore]], MeasuredTasks, list[PartialAnswers]]:
    """Let an adapter and its base answer rows, suites and tasks, from one loaded model."""
    folder, settings, chosen = kept
    partial = PartialAnswers.of_rows(folder, side.facts(), rows.read, settings, request.ranks)
    with side.open(
        rows.renderers[side], Workload(rows.read, settings, suites, rows.reader, request.ranks)
    ) as responder:
        assert isinstance(responder, ModelResponder)
        off = responder.engine.adapter_off
        request.on_begin(2 * request.answers(rows.read, suites))
        result = Scorer(responder, rows.read, settings, partial, chosen).compare(off, request.on_done)
        with off():
            base = answer_suites(suites, responder, request.on_done)
        tuned = answer_suites(suites, responder, request.on_done)
        return result, [base, tuned], _tasks_of(responder, request, settings, off), [partial]


def _require_tasks(sides: Sequence[Target], request: Request) -> None:
    """Raise UserError where tasks are asked of a server, since lm-eval reads losses of a loaded model."""
    served = [side.name for side in sides if not side.has_losses]
    if request.tasks and served:
        raise UserError(
            f"--tasks: {' and '.join(served)} is on a server, and tasks are asked of models that are loaded here",
            "leave --tasks out, or name a folder of the model's weights",
        )


def _tasks_of(
    responder: Responder,
    request: Request,
    settings: Evaluate,
    adapter_off: Callable[[], AbstractContextManager[None]] | None = None,
) -> MeasuredTasks:
    """Ask tasks of a loaded model, alone or with its adapter off and on."""
    if not request.tasks or not request.ranks.is_first:
        return MeasuredTasks()
    assert isinstance(responder, ModelResponder)
    return measure_tasks(
        *(request.tasks, responder.model, responder.renderer.tokenizer, adapter_off, request.task_options),
        *(request.rows, responder.batching.size, settings.equal_within),
        on_begin=request.on_task,
        on_done=request.on_done,
    )
