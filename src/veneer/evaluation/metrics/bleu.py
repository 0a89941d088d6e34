"""BLEU of all answers together, 0 to 100, by sacrebleu with its own defaults (Papineni et al. 2002; Post 2018).

BLEU is no mean of rows: matched and possible n-grams are summed over the rows first. So are they in each resample of
the rows that its interval comes from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from veneer.evaluation.metrics.metric import Metric, ScoredRows
from veneer.evaluation.metrics.reasoning import final_text
from veneer.evaluation.metrics.resampled import Pooled

ORDERS = 4  # n-grams of 1 to 4 words


@dataclass(frozen=True)
class Bleu(Pooled):
    """BLEU over rows; `grams` has of each row the matched n-grams, those of the answer, and both lengths."""

    grams: Sequence[Sequence[float]]

    def counts(self) -> Any:
        return self.grams

    def statistic(self, sums_SK: Any) -> Any:
        from sacrebleu.metrics.bleu import BLEU as Scorer  # noqa: N811

        def score(sums: list[int]) -> float:
            matched, possible, (answer, reference) = sums[:ORDERS], sums[ORDERS : 2 * ORDERS], sums[2 * ORDERS :]
            return float(Scorer.compute_bleu(matched, possible, answer, reference, smooth_method="exp").score)

        return np.asarray([score([int(count) for count in line]) for line in sums_SK])


def measure(rows: ScoredRows) -> dict[str, Bleu]:
    """Measure `bleu`, where any row asks something."""
    from sacrebleu.metrics.bleu import BLEU as Scorer  # noqa: N811

    scorer = Scorer(effective_order=True)  # of single rows, whose counts it leaves as they are
    grams = []
    for sample in rows.samples:
        found = scorer.sentence_score(final_text(sample.answer), [final_text(sample.reference)])
        grams.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return {"bleu": Bleu(grams)} if grams else {}


BLEU = Metric("bleu", measure, library="sacrebleu")
