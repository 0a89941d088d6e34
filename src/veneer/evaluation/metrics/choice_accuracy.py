"""Choice accuracy: of all possible answers the right one is the likeliest to the model.

The possible answers are those that each row names in a column `choices`. Rows without one share the right answers of
all held-out rows, where these repeat: the labels of a classification, the letters of a test; a label that no held-out
row has is not offered. The likelihood of each is the sum of its tokens' log-probabilities behind the row's prompt, its
end token included, so nothing is generated and no wording misses.
"""

from collections.abc import Sequence

from veneer.evaluation.metrics.metric import Metric, Sample, ScoredRows, ShareRight, needs_answers
from veneer.evaluation.metrics.reasoning import final_text

MOST_CHOICES = 26


def choices_of(references: Sequence[str]) -> tuple[str, ...]:
    """Return the possible answers in alphabetical order; none: there is one alone, or too many, or none repeats."""
    found = sorted({final_text(reference) for reference in references})
    return tuple(found) if 2 <= len(found) <= MOST_CHOICES and len(found) < len(references) else ()


def offered(samples: Sequence[Sample]) -> list[tuple[str, ...]]:
    """Return the possible answers to each row; none: it names none, and the right answers are no choices."""
    shared = choices_of([sample.reference for sample in samples])
    return [sample.choices or shared for sample in samples]


def measure(rows: ScoredRows) -> dict[str, ShareRight]:
    """Measure `choice_accuracy`, where the losses of the choices are known."""
    right = [
        min(losses, key=lambda choice: losses[choice]).strip() == final_text(sample.reference)
        for sample, losses in zip(rows.samples, rows.choices)
    ]
    return {"choice_accuracy": ShareRight(right)} if right else {}


def _needs_choices(rows: ScoredRows) -> str:
    found = {final_text(sample.reference) for sample in rows.samples}
    if not all(offered(rows.samples)):
        return (
            f"the {len(rows.samples)} rows have {len(found)} different right answers and no column `choices`, and "
            f"choices are 2 to {MOST_CHOICES} answers that repeat"
        )
    return needs_answers(rows)


CHOICE_ACCURACY = Metric("choice_accuracy", measure, _needs_choices, reads="choices")
