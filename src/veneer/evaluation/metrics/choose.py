"""Chooses the metrics of an evaluation: those that `evaluate.metrics` names, or by default those that suit the data.

The first metric is the one that decides: it stands first in evaluation.json, and says whether tuned is better. All that
is wrong with the choice is said before any model is loaded: an unknown name, a library that is not installed, rows that
cannot carry a metric.
"""

import difflib
import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veneer.config import Evaluate, UserError
from veneer.evaluation.metrics.choice_accuracy import choices_of
from veneer.evaluation.metrics.exact_match import CALL
from veneer.evaluation.metrics.final_number import NUMBER
from veneer.evaluation.metrics.json_fields import shared_keys
from veneer.evaluation.metrics.json_values import json_value
from veneer.evaluation.metrics.metric import Metric, ScoredRows
from veneer.evaluation.metrics.own import own_metric
from veneer.evaluation.metrics.reasoning import final_text

PROSE = 8  # words of a usual answer beyond which it is prose, which no model gives word for word
ROWS_A_CHOICE = 5  # rows for each label, as a mean, where the default takes repeated answers for labels
LIBRARIES = {"rouge-score": "rouge_score"}  # names to import, where they are other ones
# Metrics that a setting acts on.
ACTS_ON = {"extract": ("exact_match", "accuracy"), "json_schema": ("json_schema",)}


@dataclass(frozen=True)
class ChosenMetrics:
    """The metrics of an evaluation, the one that decides first, and why they are these."""

    metrics: tuple[Metric, ...]
    why: str

    @property
    def names(self) -> list[str]:
        return [metric.name for metric in self.metrics]

    def read(self, source: str) -> bool:
        """Return whether any of them reads a source: answers, losses or choices."""
        return any(metric.reads == source for metric in self.metrics)


def choose_metrics(known: Mapping[str, Metric], rows: ScoredRows) -> ChosenMetrics:
    """Choose metrics for rows, which need no answers yet.

    Args:
        known: The registry.
        rows: Held-out rows with their settings.

    Raises:
        UserError: A metric is not known or not installed, or the rows cannot carry it.
    """
    settings = rows.settings
    if settings.metrics == "auto":
        names, why = _default(rows)
        chosen = ChosenMetrics(find_metrics(known, names), why)
    else:
        chosen = ChosenMetrics(find_metrics(known, settings.metrics), "evaluate.metrics names them")
    for metric in chosen.metrics:
        if missing := metric.lacks(rows):
            raise UserError(f"{metric.name}: {missing}", "name other metrics in evaluate.metrics, or leave it out")
    return chosen


def require_named(known: Mapping[str, Metric], settings: Evaluate) -> None:
    """Raise UserError where a named metric is not known or not installed, or a setting acts on none of those named."""
    if settings.metrics == "auto":
        return
    for setting, metrics in ACTS_ON.items():
        if getattr(settings, setting) is not None and not set(metrics) & set(settings.metrics):
            raise UserError(
                f"evaluate.{setting} acts on {' and '.join(metrics)}, and evaluate.metrics names neither of them"
                if len(metrics) > 1
                else f"evaluate.{setting} acts on {metrics[0]}, which evaluate.metrics does not name",
                f"add {metrics[0]} to evaluate.metrics, or leave evaluate.{setting} out",
            )
    find_metrics(known, settings.metrics)


def find_metrics(known: Mapping[str, Metric], names: Sequence[str]) -> tuple[Metric, ...]:
    """Find metrics by their names, each once.

    Raises:
        UserError: One is not known, or its library is not installed.
    """
    found = []
    for name in dict.fromkeys(names):
        if name not in known and ":" not in name:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            raise UserError(
                f"evaluate.metrics: {name!r} is not a metric" + (f"; the nearest is {near[0]}" if near else ""),
                f"name some of {', '.join(known)}, or a function of your own as module:function",
            )
        metric = known[name] if name in known else own_metric(name)
        library = metric.library
        if library and importlib.util.find_spec(LIBRARIES.get(library, library)) is None:
            raise UserError(
                f"evaluate.metrics: {name} needs {library}, which is not installed",
                "pip install 'veneer[metrics]', or name other metrics",
            )
        found.append(metric)
    return tuple(found)


def _default(rows: ScoredRows) -> tuple[list[str], str]:
    """Return the metrics that suit the rows, and why."""
    if not rows.samples:
        return ["perplexity"], "the rows are texts that ask nothing"
    deciding, why = _deciding(rows)
    names = [*deciding, "exact_match", "perplexity"]
    return names if rows.settings.json_schema is None else [*names, "json_schema"], why


def _deciding(rows: ScoredRows) -> tuple[list[str], str]:
    """Return what decides before exact match does, and the reason in the data."""
    references = [final_text(sample.reference) for sample in rows.samples]
    count = len(references)
    if rows.settings.extract is not None:
        return ["exact_match"], "evaluate.extract says what is compared"
    if shared_keys(references):
        return ["json_fields"], f"the {count} right answers are JSON objects of the same keys"
    if calls := sum(CALL.search(text) is not None for text in references):
        return ["tool_calls"], f"{calls} of {count} right answers call tools"
    if all(isinstance(json_value(text), dict | list) for text in references):
        return ["exact_match", "valid_json"], f"the {count} right answers are JSON of several forms"
    if all(NUMBER.fullmatch(text.rpartition("####")[2].strip()) for text in references):
        return ["final_number"], f"the {count} right answers are numbers, or end in one behind ####"
    if all(sample.choices for sample in rows.samples):
        return ["choice_accuracy"], f"the {count} rows name their choices"
    labels = choices_of(references)
    if labels and count >= ROWS_A_CHOICE * len(labels) and all(len(label.split()) <= PROSE for label in labels):
        return ["exact_match", "choice_accuracy"], f"the {count} right answers are {len(labels)} choices"
    if (words := statistics.median(len(text.split()) for text in references)) > PROSE:
        return ["token_f1"], f"the right answers are prose (of {words:.0f} words as a rule)"
    return ["exact_match"], f"the right answers are short (of {words:.0f} words as a rule)"
