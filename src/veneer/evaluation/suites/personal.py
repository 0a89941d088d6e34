"""Counts personal data and secrets in answers that neither the prompt nor the right answer holds.

The scanner is the one that looks through training rows (data/screening/privacy.py), with its limits: no names, no
street addresses. What was found is counted and never repeated.
"""

from collections import Counter
from collections.abc import Iterable

from veneer.data.screening.privacy import find


def count_personal(answers: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Count findings by kind.

    Args:
        answers: an answer and the text that may say the same (prompt and reference) each.
    """
    counts: Counter[str] = Counter()
    for answer, given in answers:
        counts.update(found.kind for found in find(answer) if answer[found.start : found.end] not in given)
    return dict(sorted(counts.items()))
