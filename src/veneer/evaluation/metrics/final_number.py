"""Final number: the last number of the answer is that of the reference, as GSM8K is judged (arXiv 2110.14168).

Numbers are compared by value: 1,000 and 1000.0 are the same, and signs of currency and percent do not count.
"""

import re
from decimal import Decimal

from veneer.evaluation.metrics.metric import Metric, ScoredRows, ShareRight, needs_answers
from veneer.evaluation.metrics.reasoning import final_text

# A minus sign only where nothing stands before it that it would be a hyphen of, or a difference.
NUMBER = re.compile(r"(?<![\w.,)])-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+|\d+(?:,\d{3})*(?:\.\d+)?")

MINUS = "\u2212"  # the sign that typesetting has


def final_number(text: str) -> Decimal | None:
    """Return the last number in a text; None: there is none."""
    found = NUMBER.findall(final_text(text).replace(MINUS, "-"))
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def measure(rows: ScoredRows) -> dict[str, ShareRight]:
    """Measure `final_number`, where any row asks something."""
    pairs = [(final_number(sample.answer), final_number(sample.reference)) for sample in rows.samples]
    return (
        {"final_number": ShareRight([given is not None and given == right for given, right in pairs])} if pairs else {}
    )


def _needs_numbers(rows: ScoredRows) -> str:
    for sample in rows.samples:
        if final_number(sample.reference) is None:
            return f"the right answer of {sample.place} holds no number"
    return needs_answers(rows)


FINAL_NUMBER = Metric("final_number", measure, _needs_numbers)
