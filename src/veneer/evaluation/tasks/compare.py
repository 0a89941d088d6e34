"""Base against tuned on tasks of lm-eval, paired document by document, by each metric and each of its filters.

    mean of a number a document      its numbers are paired (accuracy, exact match, acc_norm)
    anything else                    each document's share in the value, by leaving it out (perplexity, F1, BLEU)
    a group of tasks                 the documents of its tasks together, weighted as the group weights them

The values are lm-eval's own; the intervals are Veneer's (differences.py). Tasks of a group are fixed parts of it and
not draws from anything, so their documents stand alone, as they do within a task.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean

from veneer.evaluation.differences import MetricComparison, RowValues, compare_rows
from veneer.evaluation.gate import Measured
from veneer.evaluation.metrics.resampled import RowMean
from veneer.evaluation.tasks.harness import TaskResults
from veneer.training.intervals import Interval, proportion

MOST_LEFT_OUT = 2000  # documents; leaving out each of n costs n aggregations of n
NO_FILTER = "none"


@dataclass(frozen=True)
class TaskValue:
    """One model's value by one metric, with what each document gave to it.

    Attributes:
        value: value that lm-eval gives
        rows: number of each document, by task and place in it, whose mean is the value; empty: it has none
        is_share: whether these numbers lie between 0 and 1 and mean what they say
    """

    value: float
    rows: Mapping[tuple[str, int], float]
    is_share: bool

    @property
    def interval(self) -> Interval:
        """The value with its 95% interval."""
        numbers = list(self.rows.values())
        if not numbers:
            return Interval(self.value, self.value, self.value)
        if set(numbers) <= {0.0, 1.0}:
            return proportion(int(sum(numbers)), len(numbers))
        found = RowMean(numbers).interval
        return Interval(self.value, found.low, found.high)


@dataclass(frozen=True)
class TaskMetric:
    """One metric of a task or a group, of both models.

    Attributes:
        name: name in results and gates: task.metric, or task.metric.filter
        task: name of the task or the group
        metric, filter: names that lm-eval gives them
        group: group whose value holds this one; None: it stands alone
        better: better values: higher or lower; empty: the task does not say
        tuned, base: values of the models; base None: there is one model alone
        comparison: tuned against base; None: it cannot be made
    """

    name: str
    task: str
    metric: str
    filter: str
    group: str | None
    better: str
    tuned: TaskValue
    base: TaskValue | None
    comparison: MetricComparison | None

    @property
    def unit(self) -> str:
        """`share` where every value of a document is between 0 and 1."""
        return "share" if self.tuned.is_share and (self.base is None or self.base.is_share) else ""

    def as_dict(self) -> dict[str, Any]:
        """Return its part of evaluation.json."""
        facts: dict[str, Any] = {"task": self.task, "metric": self.metric, "filter": self.filter, "group": self.group}
        facts |= {"unit": self.unit, "better": self.better, "documents": len(self.tuned.rows)}
        if self.base is not None:
            facts["base"] = self.base.interval.as_dict()
        facts["tuned"] = self.tuned.interval.as_dict()
        if self.comparison is not None:
            facts["difference"] = self.comparison.difference.as_dict()
        return facts


@dataclass(frozen=True)
class TaskComparison:
    """Base against tuned on one task or group of tasks.

    Attributes:
        metrics: its metrics, groups first
        tuned, base: results of each that lm-eval gives; base None: there is one model alone
    """

    metrics: Sequence[TaskMetric]
    tuned: TaskResults
    base: TaskResults | None

    def measured(self) -> dict[str, Measured]:
        """Return what a gate may name; a metric without its filter is that of the task's first filter."""
        found: dict[str, Measured] = {}
        for one in self.metrics:
            rows, unknown = len(one.tuned.rows), (-math.inf, math.inf)  # without numbers of documents nothing is shown
            values = {
                "{}": Measured(one.tuned.interval if rows else Interval(one.tuned.value, *unknown), rows, one.unit)
            }
            if one.comparison is not None:
                values["difference({})"] = Measured(one.comparison.difference, one.comparison.rows, one.unit)
            elif one.base is not None:
                apart = one.tuned.value - one.base.value
                values["difference({})"] = Measured(Interval(apart, *unknown), 0, one.unit)
            for name in (one.name, f"{one.task}.{one.metric}"):
                for form, value in values.items():
                    found.setdefault(form.format(name), value)
        return found

    def samples(self) -> list[dict[str, Any]]:
        """Return each document with both answers and its values, a line for each filter."""
        lines = []
        for task, tuned in self.tuned.samples.items():
            base = self.base.samples[task] if self.base is not None else [None] * len(tuned)
            for after, before in zip(tuned, base, strict=True):
                line = {"task": task, "filter": after["filter"], "document": after["doc_id"]}
                line |= {"prompt": after["arguments"][0][0], "target": after["target"]}
                for name, sample in (("base", before), ("tuned", after)):
                    if sample is not None:
                        values = {metric: sample[metric] for metric in sample["metrics"]}
                        line[name] = {"answer": sample["filtered_resps"], "values": values}
                lines.append(line)
        return lines


def compare_task(base: TaskResults | None, tuned: TaskResults, equal_within: float | None = None) -> TaskComparison:
    """Compare two models by what lm-eval found of them on the same documents.

    Args:
        base, tuned: Results of the same task; base None: there is one model alone.
        equal_within: Setting of that name.
    """
    before = _values(base) if base is not None else {}
    metrics = []
    for (task, metric, filter_), value in _values(tuned).items():
        name = f"{task}.{metric}" if filter_ == NO_FILTER else f"{task}.{metric}.{filter_}"
        is_higher = tuned.results["higher_is_better"].get(task, {}).get(metric)
        better = {True: "higher", False: "lower"}.get(is_higher, "")
        other = before.get((task, metric, filter_))
        compared = None if other is None else _compare(other, value, better, equal_within)
        group = _group_of(tuned, task, metric, filter_)
        metrics.append(TaskMetric(name, task, metric, filter_, group, better, value, other, compared))
    return TaskComparison(metrics, tuned, base)


def _compare(base: TaskValue, tuned: TaskValue, better: str, equal_within: float | None) -> MetricComparison | None:
    """Compare the documents that both models have a value of."""
    both = [place for place in tuned.rows if place in base.rows]
    unit = "share" if base.is_share and tuned.is_share else ""
    before, after = (RowValues([model.rows[place] for place in both], better, unit) for model in (base, tuned))
    return compare_rows(before, after, equal_within=equal_within) if both else None


def _values(found: TaskResults) -> dict[tuple[str, str, str], TaskValue]:
    """Return the values of groups and of tasks, by task, metric and filter."""
    of_tasks = {}
    for name, task in found.found.tasks.items():
        for (metric, filter_), items in _items(found.samples[name]).items():
            value = found.results["results"][name].get(f"{metric},{filter_}")
            if _is_number(value):
                aggregation = task.aggregation().get(metric, mean)
                of_tasks[name, metric, filter_] = _task_value(name, float(value), items, aggregation)
    of_groups = {}
    for name, tasks in found.found.tasks_of_groups().items():
        for key, value in found.results.get("groups", {}).get(name, {}).items():
            metric, comma, filter_ = key.partition(",")
            if comma and not metric.endswith("_stderr") and _is_number(value):
                parts = [of_tasks[part] for task in tasks if (part := (task.task_name, metric, filter_)) in of_tasks]
                listed = found.found.groups[name].aggregate_metric_list
                by_size = all(one.weight_by_size for one in listed if one.metric == metric)
                of_groups[name, metric, filter_] = _pooled(float(value), parts, by_size)
    return of_groups | of_tasks


def _is_number(value: Any) -> bool:
    """Whether lm-eval gives a value: where it has none it gives text, or NaN."""
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _items(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, Any]]:
    """Return what each document gave to each metric, by metric and filter."""
    items: dict[tuple[str, str], dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            items.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    return items


def _task_value(
    task: str, value: float, items: Mapping[int, Any], aggregation: Callable[[Sequence[Any]], float]
) -> TaskValue:
    numbers = list(items.values())
    is_mean = aggregation is mean and all(isinstance(number, int | float | np.number | np.bool_) for number in numbers)
    if not is_mean:
        numbers = _left_out(value, numbers, aggregation)
    rows = {(task, document): float(number) for document, number in zip(items, numbers)}
    return TaskValue(value, rows, is_mean and all(0 <= number <= 1 for number in rows.values()))


def _left_out(value: float, items: Sequence[Any], aggregation: Callable[[Sequence[Any]], float]) -> list[float]:
    """Return each document's share in a value, by leaving it out (the jackknife's pseudo-values, Tukey 1958).

    They are shifted so that their mean is the value. None are given of one document alone, or of more than
    `MOST_LEFT_OUT`.
    """
    if not 2 <= len(items) <= MOST_LEFT_OUT:
        return []
    without = np.asarray([aggregation([*items[:n], *items[n + 1 :]]) for n in range(len(items))], dtype=np.float64)
    shares = value + (len(items) - 1) * (without.mean() - without)
    return [float(share) for share in shares] if np.isfinite(shares).all() else []


def _pooled(value: float, parts: Sequence[TaskValue], by_size: bool) -> TaskValue:
    """Return a group's value with the documents of its tasks, so weighted that their mean is the value."""
    count = sum(len(part.rows) for part in parts)
    rows: dict[tuple[str, int], float] = {}
    for part in parts:
        weight = 1.0 if by_size else count / (len(parts) * max(1, len(part.rows)))
        rows |= {place: weight * number for place, number in part.rows.items()}
    is_whole = all(part.rows for part in parts)
    return TaskValue(value, rows if is_whole else {}, all(part.is_share for part in parts))


def _group_of(found: TaskResults, name: str, metric: str, filter_: str) -> str | None:
    """Return the smallest group that holds a task or group, and has a value by the same metric."""
    holding = {
        holder: len(tasks)
        for holder, tasks in found.found.tasks_of_groups().items()
        if name in (*(task.task_name for task in tasks), *_groups_within(found.found.groups[holder]))
        and _is_number(found.results.get("groups", {}).get(holder, {}).get(f"{metric},{filter_}"))
    }
    return min(holding, key=lambda each: holding[each]) if holding else None


def _groups_within(group: Any) -> list[str]:
    return [each.name for each in group.get_all_groups()]
