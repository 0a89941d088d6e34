"""Metrics of a model on held-out rows, a file each; `METRICS` is their registry, by the names of `evaluate.metrics`.

metric.py     what a metric is: rows in, results with an interval and a paired difference out
resampled.py  results with a bootstrap interval: means of rows, and values of all rows together
choose.py     those that a run names, or that suit its data; what is wrong with them
own.py        a function of the user's

A new metric is a file with a `Metric` and a line here; then evaluation.json, table, page and card show it.
"""

from collections.abc import Mapping, Sequence

from veneer.config import Evaluate
from veneer.evaluation.metrics.accuracy import ACCURACY
from veneer.evaluation.metrics.bits_per_byte import BITS_PER_BYTE
from veneer.evaluation.metrics.bleu import BLEU
from veneer.evaluation.metrics.choice_accuracy import CHOICE_ACCURACY
from veneer.evaluation.metrics.choose import ChosenMetrics, choose_metrics, require_named
from veneer.evaluation.metrics.chrf import CHRF
from veneer.evaluation.metrics.exact_match import EXACT_MATCH, is_right
from veneer.evaluation.metrics.final_number import FINAL_NUMBER
from veneer.evaluation.metrics.json_fields import JSON_FIELDS
from veneer.evaluation.metrics.json_schema import JSON_SCHEMA
from veneer.evaluation.metrics.length import LENGTH
from veneer.evaluation.metrics.metric import Metric, MetricResult, Sample, ScoredRows, ShareRight
from veneer.evaluation.metrics.perplexity import PERPLEXITY
from veneer.evaluation.metrics.refusal_rate import REFUSAL_RATE
from veneer.evaluation.metrics.rouge import ROUGE
from veneer.evaluation.metrics.token_f1 import TOKEN_F1
from veneer.evaluation.metrics.tool_calls import TOOL_CALLS
from veneer.evaluation.metrics.valid_json import VALID_JSON

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        EXACT_MATCH,
        ACCURACY,
        FINAL_NUMBER,
        CHOICE_ACCURACY,
        TOKEN_F1,
        *ROUGE,
        BLEU,
        CHRF,
        JSON_FIELDS,
        VALID_JSON,
        JSON_SCHEMA,
        TOOL_CALLS,
        LENGTH,
        REFUSAL_RATE,
        PERPLEXITY,
        BITS_PER_BYTE,
    )
}


def choose(rows: ScoredRows) -> ChosenMetrics:
    """Choose the metrics of rows, which need no answers yet: those that their settings name, or that suit them.

    Raises:
        UserError: A metric is not known or not installed, or the rows cannot carry it.
    """
    return choose_metrics(METRICS, rows)


def require_metrics(settings: Evaluate) -> None:
    """Raise UserError where a named metric is not known or not installed, or a setting acts on none of those named."""
    require_named(METRICS, settings)


def measure(rows: ScoredRows, chosen: ChosenMetrics | None = None) -> dict[str, MetricResult]:
    """Measure rows, by default by the metrics that `choose` gives; results by name, the one that decides first."""
    metrics = (chosen or choose(rows)).metrics
    return {name: result for metric in metrics for name, result in metric.measure(rows).items()}


def right_by(results: Mapping[str, MetricResult], samples: Sequence[Sample]) -> Sequence[bool]:
    """Return which samples are right: by the first result that says so of each answer, else by exact match."""
    for name, result in results.items():
        if isinstance(result, ShareRight) and (name not in METRICS or METRICS[name].reads == "answers"):
            return result.true
    return [is_right(sample.answer, sample.reference) for sample in samples]


def right_rows(samples: Sequence[Sample], settings: Evaluate) -> Sequence[bool]:
    """Judge answers alone as an evaluation with these settings does: by its first metric that says right or wrong."""
    return right_by(measure(ScoredRows(samples, settings=settings)), samples)


__all__ = ["METRICS", "Metric", "MetricResult", "Sample", "ScoredRows", "ShareRight", "choose", "measure"]
