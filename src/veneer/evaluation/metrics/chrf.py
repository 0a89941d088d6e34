"""chrF: the n-grams of characters that answer and reference share, 0 to 100 (Popovic 2015), by sacrebleu.

It is computed for each row, and the mean of the rows is given, so that rows can be paired. It needs no words, so it
suits every script.
"""

from veneer.evaluation.metrics.metric import Metric, ScoredRows
from veneer.evaluation.metrics.reasoning import final_text
from veneer.evaluation.metrics.resampled import RowMean


def measure(rows: ScoredRows) -> dict[str, RowMean]:
    """Measure `chrf`, where any row asks something."""
    from sacrebleu.metrics.chrf import CHRF as Scorer  # noqa: N811

    scorer = Scorer()
    values = [
        scorer.sentence_score(final_text(sample.answer), [final_text(sample.reference)]).score
        for sample in rows.samples
    ]
    return {"chrf": RowMean(values)} if values else {}


CHRF = Metric("chrf", measure, library="sacrebleu")
