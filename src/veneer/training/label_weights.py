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
    counts = Counter(int(label) for example in data.train for label in example.ids[example.weights > 0])
    if run.model.task == "sequence-classification":
        require_classes(counts, labels, str(run.data.train), run.data.validation)
    weights = run.train.class_weights
    if weights == "none":
        return
    if weights == "balanced":
        # Of tags, some may be held out alone.
        weights = tuple(counts.total() / (len(labels) * max(1, counts[number])) for number in range(len(labels)))
    data.train.label_weights = data.validation.label_weights = weights
