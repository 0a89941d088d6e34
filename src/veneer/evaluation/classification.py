"""Metrics of classifiers, each with a 95% interval over rows: accuracy, macro F1, calibration error; and confusions.

Accuracy has Wilson's interval. Macro F1 (the mean of the labels' F1, labels without a row left out) and the expected
calibration error (ECE, 10 bins of equal width: arXiv 1706.04599) have percentiles of a bootstrap over rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from veneer.config import Run
from veneer.data.batch import Example
from veneer.data.pipeline import Prepared
from veneer.data.render import Renderer
from veneer.engine.interface import Engine
from veneer.machine.batching import Batching
from veneer.training.best import BETTER, LOSS

BINS = 10
RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True)
class Scores:
    """Scores of rows.

    Attributes:
        labels_R: id of each row's label.
        probabilities_RC: probability of each label.
    """

    labels_R: Any
    probabilities_RC: Any

    @property
    def predicted(self) -> Any:
        return self.probabilities_RC.argmax(1)


def accuracy(scores: Scores) -> float:
    return float((scores.predicted == scores.labels_R).mean())


def macro_f1(scores: Scores) -> float:
    matrix = confusions(scores)
    right, given, there = np.diag(matrix), matrix.sum(0), matrix.sum(1)
    f1 = 2 * right / np.maximum(given + there, 1)
    return float(f1[there > 0].mean())


def calibration_error(scores: Scores) -> float:
    sure_R = scores.probabilities_RC.max(1)
    right_R = scores.predicted == scores.labels_R
    bin_R = np.minimum((sure_R * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bin_R, weights=right_R - sure_R, minlength=BINS)
    return float(np.abs(gaps).sum() / len(sure_R))


def confusions(scores: Scores) -> Any:
    """Return how many rows of each label (first index) were given each label (second index)."""
    classes = scores.probabilities_RC.shape[1]
    pairs_R = scores.labels_R * classes + scores.predicted
    return np.bincount(pairs_R, minlength=classes * classes).reshape(classes, classes)


METRICS: dict[str, Callable[[Scores], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "calibration_error": calibration_error,
}


class DuringClassification:
    """Measures accuracy and macro F1 of held-out rows while a classifier is trained; see `DuringMetrics`."""

    def __init__(self, run: Run, data: Prepared, renderer: Renderer) -> None:
        self._rows, self._batching = data.validation, batching(run)
        followed = run.train.early_stopping.metric if run.train.early_stopping is not None else LOSS
        self.better = BETTER[followed]

    def measure(self, model: Any, engine: Engine, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Return the values; None where it was stopped."""
        scores = score(engine, self._rows, self._batching, stopped)
        return None if scores is None else {"accuracy": accuracy(scores), "macro_f1": macro_f1(scores)}


def batching(run: Run) -> Batching:
    """Return what takes rows in batches of a run's size."""
    return Batching(run.evaluate.batch_size, "lower data.max_length", "scores")


def score(
    engine: Any, rows: Sequence[Example], batching: Batching, stopped: Callable[[], bool] = lambda: False
) -> Scores | None:
    """Score rows with their labels; None where it was stopped."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))
    found: dict[int, Any] = {}

    def work(chosen: Sequence[int]) -> Any:
        return None if stopped() else engine.scores([torch.from_numpy(rows[n].ids[:-1]).long() for n in chosen])

    at = 0
    for logits_BC in batching.over(order, work):
        if logits_BC is None:
            return None
        for logits_C in logits_BC:
            found[order[at]] = logits_C.double().softmax(0).numpy()
            at += 1
    labels_R = np.array([int(rows[n].ids[-1]) for n in range(len(rows))])
    return Scores(labels_R, np.stack([found[n] for n in range(len(rows))]))


def wilson(right: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share."""
    share, spread = right / rows, z * z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / rows + spread / (4 * rows)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
