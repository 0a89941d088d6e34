"""Metrics of a model on held-out rows, a file each; `METRICS` is their registry.

metric.py       what a metric is: rows in, results with an interval and a paired difference out
exact_match.py  the answer is the expected one
json_fields.py  answers that are JSON objects, key by key
perplexity.py   the loss of the references

A new metric is a file with a function `measure`, and a line here; then evaluation.json, table, page and card show it.
"""

from veneer.evaluation.metrics import exact_match, json_fields, perplexity
from veneer.evaluation.metrics.metric import Metric, MetricResult, Sample, ScoredRows, ShareRight

METRICS: tuple[Metric, ...] = (
    exact_match.measure,
    json_fields.measure,
    perplexity.measure,
)


def measure(rows: ScoredRows) -> dict[str, MetricResult]:
    """Measure all metrics; results by name, in the order of the registry, without metrics that do not apply."""
    return {name: result for metric in METRICS for name, result in metric(rows).items()}


__all__ = ["METRICS", "Metric", "MetricResult", "Sample", "ScoredRows", "ShareRight", "measure"]
