"""Finds tasks by the names of lm-eval, or in folders and files of one's own, with their documents.

All that is wrong is said before a model is loaded: an unknown name, a broken file, documents on a hub that cannot be
had, code that would run. What a task asks for is read from its YAML before it is built, since building a task fetches
its documents and imports its functions.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.group import Group
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.tasks import TaskManager

from veneer.config import UserError
from veneer.config.hub import not_here, unreachable
from veneer.data.sources.hub import from_cache_alone, quiet_datasets
from veneer.evaluation.tasks.options import TaskOptions, is_path
from veneer.evaluation.tasks.quiet_harness import quiet_harness

SHOWN = 300  # characters of another library's message


@dataclass(frozen=True)
class FoundTask:
    """A task, or a group of tasks, with its documents.

    Attributes:
        name: its name
        tasks: tasks of lm-eval by name: itself, or those of the group
        groups: the group and those within it, by name; empty: it is a single task
    """

    name: str
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]

    @property
    def parts(self) -> dict[str, list[Any]]:
        """The tasks behind each name that has values: a task itself, and those of a group."""
        return {name: [task] for name, task in self.tasks.items()} | self.tasks_of_groups()

    def tasks_of_groups(self) -> dict[str, list[Any]]:
        """Return the tasks that each group holds, also within groups of its own."""
        return {name: group.get_all_tasks() for name, group in self.groups.items()}


def find_tasks(names: Sequence[str], options: TaskOptions) -> list[FoundTask]:
    """Find tasks, and fetch their documents where they are not on this machine.

    Args:
        names: names of tasks, groups and tags of lm-eval, folders of YAML files, or single files.
        options: whether code may run.

    Raises:
        UserError: There is no such task, its file is broken, its documents cannot be had, or it would run code.
    """
    found: dict[str, FoundTask] = {}
    with quiet_harness(), quiet_datasets():
        built_in = None if all(map(is_path, names)) else TaskManager()
        for name in names:
            manager, entries = _own_tasks(Path(name).expanduser()) if is_path(name) else (built_in, [name])
            assert manager is not None
            for entry in entries:
                _require_known(manager, entry)
                _require_harmless(manager, entry, options)
                for item in _build(manager, entry):
                    _require_askable(item, options)
                    found.setdefault(item.name, item)
    _require_once(found)
    return list(found.values())


def _own_tasks(path: Path) -> tuple[TaskManager, list[str]]:
    """Return what lm-eval reads of a folder or a file, and the names to ask: groups, and tasks that are in none.

    Raises:
        UserError: A file is broken, or none holds a task.
    """
    path = path.resolve()
    folder = path.parent if path.is_file() else path
    files = [path] if path.is_file() else sorted(folder.rglob("*.yaml"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = {entry.yaml_path: name for name, entry in manager.task_index.items() if entry.yaml_path is not None}
    asked = []
    for file in files:
        if not _declares_task(file):
            continue
        if file not in names:
            _build(manager, str(file))  # lm-eval has left it out; this says why
            raise UserError(f"--tasks {file}: its task or group has a name that is taken", "give it another name")
        asked.append(names[file])
    if not asked:
        raise UserError(f"--tasks {path}: holds no task", "name a folder of lm-eval's .yaml files with `task: NAME`")
    within = {member for name in asked for member in _members(manager, name) if member != name}
    return manager, [name for name in asked if name not in within]


def _declares_task(file: Path) -> bool:
    """Whether a YAML file holds a task or a group, and not a part that others include.

    Raises:
        UserError: It is no YAML.
    """
    try:
        top = yaml.compose(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tasks {file}: not a YAML file: {_said(error)}", "correct it") from None
    return isinstance(top, yaml.MappingNode) and any(key.value in ("task", "group") for key, _ in top.value)


def _members(manager: TaskManager, name: str) -> Iterator[str]:
    """Yield the names of a task, or of a group or tag and all that it holds."""
    yield name
    entry = manager.task_index.get(name)
    if entry is not None:
        # A tag, which no file declares, holds the names of its tasks.
        listed = sorted(entry.tags) if entry.yaml_path is None else (entry.cfg or {}).get("task")
        for child in _names_in(listed if isinstance(listed, list) else []):
            yield from _members(manager, child)


def _names_in(listed: Sequence[Any]) -> Iterator[str]:
    """Yield the names in a group's list of tasks; an item may be a group or a task with settings of its own."""
    for item in listed:
        inner = item.get("task", item.get("group")) if isinstance(item, dict) else item
        yield from _names_in(inner) if isinstance(inner, list) else [str(inner)]


def _require_known(manager: TaskManager, name: str) -> None:
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
        raise UserError(
            f"--tasks {name}: no task of lm-eval" + (f"; the nearest are {', '.join(near)}" if near else ""),
            "name one of them, or a folder of your own with its path (./mytask/); `lm-eval ls tasks` lists all",
        )


def _require_harmless(manager: TaskManager, name: str, options: TaskOptions) -> None:
    """Raise UserError where a task's YAML says that it runs code, or names a metric whose code is on a hub."""
    for member in () if options.confirm_run_unsafe_code else _members(manager, name):
        config = _config(manager, member)
        if config.get("unsafe_code"):
            raise _runs_code(member, "runs code that the model writes")
        if foreign := _foreign_metrics(config):
            raise _runs_code(member, f"needs the metric {foreign[0]}, whose code would be fetched from a hub")


def _require_askable(item: FoundTask, options: TaskOptions) -> None:
    """Raise UserError where a built task runs code, as one that is written in Python may say, or shows pictures."""
    for name, task in item.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not options.confirm_run_unsafe_code:
            raise _runs_code(name, "runs code that the model writes")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"--tasks {name}: its documents hold pictures or sound", "name tasks of text alone")


def _runs_code(name: str, why: str) -> UserError:
    return UserError(
        f"--tasks {name}: {why}",
        "leave it out; or allow it, where it can do no harm: --task-option confirm_run_unsafe_code=true",
    )


def _config(manager: TaskManager, name: str) -> Mapping[str, Any]:
    entry = manager.task_index.get(name)
    return (entry.cfg if entry is not None else None) or {}


def _foreign_metrics(config: Mapping[str, Any]) -> list[str]:
    """Return the metrics of a task that lm-eval does not have itself."""
    if config.get("process_results") is not None:
        return []  # its own function scores
    names = []
    for metric in config.get("metric_list") or ():
        name = str(metric.get("metric")) if isinstance(metric, dict) else str(metric)
        if "/" in name:
            continue  # a function in the task's own folder
        if name not in METRIC_REGISTRY or (isinstance(metric, dict) and metric.get("hf_evaluate")):
            names.append(name)
    return names


def _build(manager: TaskManager, name: str) -> list[FoundTask]:
    """Build tasks, which reads their documents; those of a tag are several.

    Raises:
        UserError: Their documents cannot be had, or lm-eval cannot build them.
    """
    why = unreachable()
    try:
        with from_cache_alone(why is not None):
            loaded = manager.load([name])
    except Exception as error:  # a task is configuration and code of anybody's, and so are its errors  # noqa: BLE001
        datasets = [_config(manager, member).get("dataset_path") for member in _members(manager, name)]
        raise _refused(name, error, next(filter(None, datasets), None), why) from None
    groups = loaded["groups"]
    within = {child for group in groups.values() for child in group.child_names}
    roots = [group for group in groups.values() if group.name not in within]
    found = [_found_group(group) for group in roots]
    alone = [task for task in loaded["tasks"] if not any(task in item.tasks for item in found)]
    return found + [FoundTask(task, {task: loaded["tasks"][task]}, {}) for task in alone]


def _found_group(group: Group) -> FoundTask:
    return FoundTask(
        group.name,
        {task.task_name: task for task in group.get_all_tasks()},
        {each.name: each for each in (group, *group.get_all_groups())},
    )


def _refused(name: str, error: Exception, dataset: str | None, why: str | None) -> UserError:
    """Return what to say of a task that cannot be built.

    Args:
        name: name of the task.
        error: lm-eval's error.
        dataset: dataset that holds its documents, or the format of its files.
        why: reason why the hub cannot be asked; None: it can.
    """
    if isinstance(error, ConnectionError) and why is not None:
        return not_here(f"--tasks {name}: the dataset {dataset}", why)
    if isinstance(error, OSError):
        return UserError(
            f"--tasks {name}: the documents ({dataset}) cannot be had: {_said(error)}",
            "check dataset_path and data_files; paths start from the folder where the command is called",
        )
    return UserError(f"--tasks {name}: lm-eval cannot build it: {_said(error)}", "correct the task's YAML file")


def _require_once(found: Mapping[str, FoundTask]) -> None:
    """Raise UserError where a task is asked alone and in a group, or in two groups."""
    seen: dict[str, str] = {}
    for item in found.values():
        for task in item.tasks:
            if task in seen:
                raise UserError(f"--tasks: {task} is in {seen[task]} and in {item.name}", "name one of the two")
            seen[task] = item.name


def _said(error: Exception) -> str:
    """Return what an error says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:SHOWN] + ("..." if len(text) > SHOWN else "")
