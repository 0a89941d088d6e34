"""Token F1: how many words the answer and the reference share, as SQuAD is judged (arXiv 1606.05250).

Precision is the share of the answer's words that the reference has, recall the share of the reference's words that the
answer has; F1 is their harmonic mean. The order of words does not count.
"""

from collections import Counter

from veneer.evaluation.metrics.metric import Metric, ScoredRows
from veneer.evaluation.metrics.reasoning import final_text
from veneer.evaluation.metrics.resampled import RowMean
from veneer.evaluation.metrics.words import words


def token_f1(answer: str, reference: str) -> float:
    """Compute F1 of the words of two texts; two without any word are the same."""
    given, right = Counter(words(final_text(answer))), Counter(words(final_text(reference)))
    if not given or not right:
        return float(given == right)
    return 2 * (given & right).total() / (given.total() + right.total())


def measure(rows: ScoredRows) -> dict[str, RowMean]:
    """Measure `token_f1`, where any row asks something."""
    values = [token_f1(sample.answer, sample.reference) for sample in rows.samples]
    return {"token_f1": RowMean(values, "share")} if values else {}


TOKEN_F1 = Metric("token_f1", measure)
