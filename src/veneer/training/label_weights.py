"""Weighs the labels of a run's rows in its loss, as `train.class_weights` says."""

from collections import Counter
from collections.abc import Sequence

from veneer.config import Run
from veneer.data.labels import require_classes
from veneer.data.pipeline import Prepared


def weigh_labels(run: Run, data: Prepared, labels: Sequence[str]) -> None:
    """Give the labels of training and held-out rows their weights, in place.

    Raises:
        UserError: training rows have a single label, or lack one.
    """
    counts = Counter(int(example.ids[-1]) for example in data.train)
    require_classes(counts, labels, str(run.data.train), run.data.validation)
    weights = run.train.class_weights
    if weights == "none":
        return
    if weights == "balanced":
        weights = tuple(counts.total() / (len(labels) * counts[number]) for number in range(len(labels)))
    data.train.label_weights = data.validation.label_weights = weights
