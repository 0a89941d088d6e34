"""Metrics of classifiers, each with a 95% interval over rows: accuracy, macro F1, calibration error; and confusions.

Accuracy has Wilson's interval. Macro F1 (the mean of the labels' F1, labels without a row left out) and the expected
calibration error (ECE, 10 bins of equal width: arXiv 1706.04599) have percentiles of a bootstrap over rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from veneer.config import Run
from veneer.data.batch import Example
from veneer.data.pipeline import Prepared
from veneer.data.render import Renderer
from veneer.engine.interface import Engine
from veneer.machine.batching import Batching
from veneer.machine.ranks import ALONE, Ranks
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

    def at(self, rows: Any) -> "Scores":
        """Return those of some rows, by number."""
        return Scores(self.labels_R[rows], self.probabilities_RC[rows])


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


def batching(run: Run, ranks: Ranks = ALONE) -> Batching:
    """Return what takes rows in batches of a run's size, over all ranks."""
    return Batching(run.evaluate.batch_size, "lower data.max_length", "scores", ranks=ranks)


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


def scores_of(encoded: Sequence[Sequence[int]], engine: Any, batching: Batching) -> torch.Tensor:
    """Return the logits of texts, in their order; those of like length are computed together."""
    order = sorted(range(len(encoded)), key=lambda n: -len(encoded[n]))
    logits_BC = torch.cat(
        list(batching.over(order, lambda some: engine.scores([torch.tensor(encoded[n]) for n in some])))
    )
    return logits_BC[torch.tensor(order).argsort()]


def wilson(right: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share."""
    share, spread = right / rows, z * z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / rows + spread / (4 * rows)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Judged:
    """A classifier's metrics on held-out rows, beside those of what it is compared with.

    Attributes:
        labels: names of the labels.
        rows: number of rows.
        compared_with: name of what `base` is: the base's own head, or the majority label of the training rows.
        metrics: by name, `tuned`, `base` and their `difference`: value, low and high.
        by_label: rows, precision, recall and F1 of each label.
        confusions: rows of each label (first index) that were given each label (second index).
    """

    labels: tuple[str, ...]
    rows: int
    compared_with: str
    metrics: dict[str, dict[str, dict[str, float]]]
    by_label: dict[str, dict[str, float]]
    confusions: list[list[int]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(labels: Sequence[str], tuned: Scores, base: Scores, compared_with: str) -> Judged:
    """Compare the scores of a classifier with others of the same rows; calibration is the classifier's alone."""
    rows = len(tuned.labels_R)
    rng = np.random.default_rng(SEED)
    drawn = [rng.integers(0, rows, rows) for _ in range(RESAMPLES)]
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for name, metric in METRICS.items():
        values = {"tuned": tuned} if name == "calibration_error" else {"tuned": tuned, "base": base}
        resampled = {who: np.array([metric(scores.at(rows_of)) for rows_of in drawn]) for who, scores in values.items()}
        metrics[name] = {who: _interval(metric(scores), resampled[who]) for who, scores in values.items()}
        if name == "accuracy":
            for who, scores in values.items():
                low, high = wilson(int((scores.predicted == scores.labels_R).sum()), rows)
                metrics[name][who] |= {"low": low, "high": high}
        if "base" in values:
            difference = metric(tuned) - metric(base)
            metrics[name]["difference"] = _interval(difference, resampled["tuned"] - resampled["base"])
    matrix = confusions(tuned)
    by_label = {}
    for number, label in enumerate(labels):
        right, given, there = (int(n) for n in (matrix[number, number], matrix[:, number].sum(), matrix[number].sum()))
        by_label[label] = {
            "rows": there,
            "precision": right / given if given else 0.0,
            "recall": right / there if there else 0.0,
            "f1": 2 * right / (given + there) if given + there else 0.0,
        }
    return Judged(tuple(labels), rows, compared_with, metrics, by_label, matrix.tolist())


def majority(labels_R: Any, most: int, classes: int) -> Scores:
    """Return the scores of a rule that gives every row one label."""
    return Scores(labels_R, np.tile(np.eye(classes)[most], (len(labels_R), 1)))


def _interval(value: float, resampled: Any) -> dict[str, float]:
    low, high = np.percentile(resampled, (2.5, 97.5)).tolist()
    return {"value": value, "low": min(low, value), "high": max(high, value)}
