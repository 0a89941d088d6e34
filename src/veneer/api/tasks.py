"""Asks tasks of lm-eval of a base and of the tuned model, one task after the other, on the model that is loaded."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from veneer.api.load import LoadedModel
from veneer.config import JobError, RunFolder
from veneer.config.folder import write_json
from veneer.engine.interface import Engine
from veneer.evaluation.gate import Measured
from veneer.evaluation.memory import LESS_MEMORY
from veneer.evaluation.tasks.options import DEFAULT_OPTIONS, TaskOptions, task_names
from veneer.machine.batching import Batching

if TYPE_CHECKING:  # lm-eval is an extra
    from veneer.evaluation.tasks.compare import TaskComparison
    from veneer.evaluation.tasks.find import FoundTask

Progress = Callable[[int], None]


@dataclass(frozen=True)
class MeasuredTasks:
    """What was measured of tasks.

    Attributes:
        compared: tasks and groups, as they were asked
        settings: all that scores depend on beside the model
    """

    compared: "Sequence[TaskComparison]" = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the key `tasks` of evaluation.json."""
        metrics = [one for task in self.compared for one in task.metrics]
        return {
            "metrics": {one.name: one.as_dict() for one in metrics},
            "comparison": {one.name: one.comparison.as_dict() for one in metrics if one.comparison is not None},
            "settings": dict(self.settings),
        }

    def against(self, base: "MeasuredTasks", equal_within: float | None = None) -> "MeasuredTasks":
        """Compare two models that were each asked the same tasks alone, such as a merged folder and its base.

        Args:
            base: The model that it is compared with.
            equal_within: Setting of that name.
        """
        from veneer.evaluation.tasks.compare import compare_task

        pairs = zip(base.compared, self.compared, strict=True)
        compared = tuple(compare_task(before.tuned, after.tuned, equal_within) for before, after in pairs)
        return MeasuredTasks(compared, {**self.settings, "base": dict(base.settings)})

    def measured(self) -> dict[str, Measured]:
        """Return what a gate may name."""
        return {name: found for task in self.compared for name, found in task.measured().items()}

    def sample_lines(self) -> str:
        """Return each document with both answers and its values, JSON, a line a document and filter."""
        lines = (line for task in self.compared for line in task.samples())
        return "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)


def load_tasks(names: str, options: TaskOptions = DEFAULT_OPTIONS) -> "Sequence[FoundTask]":
    """Find tasks and read their documents, before any model is loaded.

    Args:
        names: Names of lm-eval's tasks, folders or files, with commas between.
        options: Choices that change scores.

    Raises:
        UserError: lm-eval is not installed; a task is not known or broken, its documents cannot be had, or it would
            run code.
    """
    asked = task_names(names)
    from veneer.evaluation.tasks.find import find_tasks

    return find_tasks(asked, options)


def names_of(tasks: "Iterable[FoundTask]") -> list[str]:
    """Return what a gate may name of tasks that are not asked yet: task.metric, of groups too."""
    return [
        f"{name}.{metric}"
        for found in tasks
        for name, within in found.parts.items()
        for metric in dict.fromkeys(metric for task in within for metric in task.aggregation())
    ]


def measure_tasks(
    tasks: "Sequence[FoundTask]",
    model: Any,
    tokenizer: Any,
    adapter_off: Callable[[], AbstractContextManager[None]] | None = None,
    options: TaskOptions = DEFAULT_OPTIONS,
    limit: int | None = None,
    batch_size: int = 1,
    equal_within: float | None = None,
    *,
    on_begin: Callable[[str, int], None] = lambda what, requests: None,
    on_done: Progress = lambda requests: None,
    keep: Callable[[MeasuredTasks], None] = lambda measured: None,
) -> MeasuredTasks:
    """Ask tasks of a loaded model, with its adapter off and on.

    Args:
        tasks: Tasks that `load_tasks` found.
        model: The Transformers or PEFT model.
        tokenizer: Its tokenizer; its chat template decides whether documents are turns of a chat.
        adapter_off: Context in which the model is the base; None: it is asked alone.
        options: Choices that change scores.
        limit: Largest number of documents of each task; None: all.
        batch_size: Requests at a time; fewer where memory runs out.
        equal_within: Setting of that name.
        on_begin: Callback that gets the task with the model, and the number of requests to come.
        on_done: Callback that gets the number of requests just answered.
        keep: Callback that gets what is measured so far, once each task is done.

    Raises:
        JobError: A task ends in an error; what was measured before is kept.
    """
    from veneer.evaluation.tasks.compare import compare_task
    from veneer.evaluation.tasks.harness import HarnessModel, ask_task

    is_chat = bool(tokenizer.chat_template) if options.apply_chat_template is None else options.apply_chat_template
    batching = Batching(batch_size, LESS_MEMORY)
    settings = options.model_dump() | {"apply_chat_template": is_chat, "limit": limit, "lm_eval": version("lm-eval")}
    done: list[TaskComparison] = []
    asked = ""
    asking = HarnessModel(model, tokenizer, lambda requests: on_begin(asked, requests), on_done)
    for task in tasks:
        parts = (task, asking, options, limit, batching, is_chat)
        base = None
        if adapter_off is not None:
            asked = f"{task.name}, base"
            with adapter_off():
                base = ask_task(*parts)
        asked = task.name if adapter_off is None else f"{task.name}, tuned"
        tuned = ask_task(*parts)
        done.append(compare_task(base, tuned, equal_within))
        measured = MeasuredTasks(tuple(done), settings | _of_tasks(done) | {"batch_size": batching.size})
        keep(measured)
    return measured


def measure_run_tasks(
    tasks: "Sequence[FoundTask]",
    folder: RunFolder,
    loaded: LoadedModel,
    engine: Engine,
    options: TaskOptions,
    limit: int | None,
    batch_size: int,
    *,
    on_begin: Callable[[str, int], None],
    on_done: Progress,
) -> MeasuredTasks:
    """Ask tasks of a run's base and tuned model; until all are done, those that are lie in its folder.

    Args:
        folder: The run's folder.
        loaded: The tuned model.
        engine: The engine that switches its adapter off.
        tasks, options, limit, batch_size, on_begin, on_done: arguments of `measure_tasks`.

    Raises:
        JobError: A task ends in an error; the message says where those before it are.
    """
    assert loaded.run is not None
    file = folder.other_evaluations / "tasks-so-far.json"
    file.unlink(missing_ok=True)
    parts = (tasks, loaded.model, loaded.renderer.tokenizer, engine.adapter_off, options, limit, batch_size)
    try:
        measured = measure_tasks(
            *parts,
            loaded.run.evaluate.equal_within,
            on_begin=on_begin,
            on_done=on_done,
            keep=lambda measured: write_json(file, {"tasks": measured.as_dict()}),
        )
    except JobError as error:
        kept = f"\n  kept: {file} holds the tasks before it" if file.exists() else ""
        raise JobError(f"{error}{kept}") from error
    file.unlink()
    return measured


def _of_tasks(done: "Sequence[TaskComparison]") -> dict[str, Any]:
    """Return versions and examples of all tasks that were asked."""
    found = [task.tuned.results for task in done]
    return {
        name: {task: value for results in found for task, value in results[key].items()}
        for name, key in (("versions", "versions"), ("examples", "n-shot"))
    }
