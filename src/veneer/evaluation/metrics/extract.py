"""The part of an answer that is compared: `evaluate.extract`, a regular expression, finds it.

Its last match counts, since answers reason first and conclude last; of a pattern with groups the first group.
"""

import re

from veneer.config import Evaluate
from veneer.evaluation.metrics.metric import ScoredRows, needs_answers
from veneer.evaluation.metrics.reasoning import final_text


def extracted(text: str, settings: Evaluate) -> str | None:
    """Return the part of an answer that is compared, without its reasoning; None: the pattern finds nothing in it."""
    text = final_text(text)
    if settings.extract is None:
        return text
    found = list(re.finditer(settings.extract, text, re.MULTILINE))
    if not found:
        return None
    part: str | None = found[-1][1] if found[-1].re.groups else found[-1][0]
    return (part or "").strip()


def needs_match(rows: ScoredRows) -> str:
    """Return why the references cannot be compared: evaluate.extract finds nothing in one of them."""
    for sample in rows.samples:
        if extracted(sample.reference, rows.settings) is None:
            return f"evaluate.extract = {rows.settings.extract!r} finds nothing in the right answer of {sample.place}"
    return needs_answers(rows)
