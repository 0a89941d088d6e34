"""Accuracy: the answer is the expected one but for case, punctuation, articles and white space.

With `evaluate.extract` only what its pattern finds is compared.
"""

from veneer.evaluation.metrics.extract import extracted, needs_match
from veneer.evaluation.metrics.metric import Metric, ScoredRows, ShareRight
from veneer.evaluation.metrics.words import words


def measure(rows: ScoredRows) -> dict[str, ShareRight]:
    """Measure `accuracy`, where any row asks something."""
    right = []
    for sample in rows.samples:
        given, expected = (extracted(text, rows.settings) for text in (sample.answer, sample.reference))
        right.append(given is not None and expected is not None and _normal(given) == _normal(expected))
    return {"accuracy": ShareRight(right)} if right else {}


def _normal(text: str) -> list[str] | str:
    """Return the words of a text; of one that is nothing but punctuation and articles, the text."""
    return words(text) or text.strip()


ACCURACY = Metric("accuracy", measure, needs_match)
