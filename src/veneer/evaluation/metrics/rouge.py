"""ROUGE: words, pairs of words and the longest common sequence of words that answer and reference share (Lin 2004).

Values are F-measures of the library rouge-score, without stemming. Its words are made of a to z and 0 to 9 alone, so
rows in other scripts are refused instead of being scored zero.
"""

import re
from collections.abc import Callable

from veneer.evaluation.metrics.metric import Metric, ScoredRows, needs_answers
from veneer.evaluation.metrics.reasoning import final_text
from veneer.evaluation.metrics.resampled import RowMean


def _measure(name: str, kind: str) -> Callable[[ScoredRows], dict[str, RowMean]]:
    def measure(rows: ScoredRows) -> dict[str, RowMean]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind])
        values = [
            scorer.score(final_text(sample.reference), final_text(sample.answer))[kind].fmeasure
            for sample in rows.samples
        ]
        return {name: RowMean(values, "share")} if values else {}

    return measure


def _needs_latin_words(rows: ScoredRows) -> str:
    for sample in rows.samples:
        if not re.search("[a-z0-9]", sample.reference.lower()):
            return f"the right answer of {sample.place} has no word of a to z or 0 to 9, and ROUGE sees no others"
    return needs_answers(rows)


ROUGE = tuple(
    Metric(name, _measure(name, kind), _needs_latin_words, library="rouge-score")
    for name, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL"))
)
