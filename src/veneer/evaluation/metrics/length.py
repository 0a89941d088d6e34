"""Length of the answers in characters, reasoning left out. It judges nothing: it shows answers that became long."""

from veneer.evaluation.metrics.metric import Metric, ScoredRows
from veneer.evaluation.metrics.reasoning import final_text
from veneer.evaluation.metrics.resampled import RowMean


def measure(rows: ScoredRows) -> dict[str, RowMean]:
    """Measure `length`, where any row asks something."""
    values = [float(len(final_text(sample.answer))) for sample in rows.samples]
    return {"length": RowMean(values, better="")} if values else {}


LENGTH = Metric("length", measure)
