"""Measures a token classifier on rows with tags: entity F1 and its parts by type, and the accuracy of tags.

Tags that are of no scheme of entities (parts of speech, say) have an accuracy alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from veneer.config import Run, UserError
from veneer.data.batch import Example
from veneer.data.pipeline import Prepared
from veneer.data.render import Renderer
from veneer.data.tagged import is_entity_tag
from veneer.engine.interface import Engine
from veneer.evaluation.classification import batching
from veneer.evaluation.entities import EntityScores
from veneer.evaluation.metrics.resampled import Pooled, PooledShare
from veneer.machine.batching import Batching
from veneer.model.classifier import labels_of
from veneer.training.best import BETTER, LOSS

SCORES = ("f1", "precision", "recall")


class TaggedRows(NamedTuple):
    """Predicted and right tags of each row's words that have a token."""

    predicted: list[list[str]]
    right: list[list[str]]


class DuringTagging:
    """Measures held-out rows while a token classifier is trained; see `DuringMetrics`."""

    def __init__(self, run: Run, data: Prepared, renderer: Renderer) -> None:
        self._rows, self._batching, self._labels = data.validation, batching(run), labels_of(renderer)
        followed = run.train.early_stopping.metric if run.train.early_stopping is not None else LOSS
        if followed.startswith("entity_") and not all(map(is_entity_tag, self._labels)):
            raise UserError(
                f"train.early_stopping.metric = {followed}: the tags are not those of entities (B-PER and the like)",
                "follow `accuracy`, or the loss",
            )
        self.better = BETTER[followed]

    def measure(self, model: Any, engine: Engine, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Return the values; None where it was stopped."""
        rows = tag_rows(engine, self._rows, self._labels, self._batching, stopped)
        if rows is None:
            return None
        return {name: float(result.value) for name, result in tag_scores(rows, self._labels, by_type=False).items()}


def tag_rows(
    engine: Any,
    rows: Sequence[Example],
    labels: Sequence[str],
    batching: Batching,
    stopped: Callable[[], bool] = lambda: False,
) -> TaggedRows | None:
    """Predict the tags of rows; None where it was stopped."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row].ids))
    predicted: list[list[str]] = [[] for _ in rows]
    right: list[list[str]] = [[] for _ in rows]

    def work(chosen: Sequence[int]) -> list[torch.Tensor] | None:
        if stopped():
            return None
        return list(engine.token_scores([torch.from_numpy(_text(rows[row])).long() for row in chosen]))

    at = 0
    for scores in batching.over(order, work):
        if scores is None:
            return None
        for logits_LC in scores:
            example = rows[order[at]]
            is_tag = example.weights > 0
            has_tag = example.targets[~is_tag] >= 0
            predicted[order[at]] = [labels[n] for n in logits_LC.argmax(1)[torch.from_numpy(has_tag)].tolist()]
            right[order[at]] = [labels[n] for n in example.ids[is_tag].tolist()]
            at += 1
    return TaggedRows(predicted, right)


def tag_scores(rows: TaggedRows, labels: Sequence[str], by_type: bool = True) -> dict[str, Pooled]:
    """Return the scores of rows by name, the one that decides first; with a type's own as `f1.PER`."""
    found: dict[str, Pooled] = {}
    if all(map(is_entity_tag, labels)):
        entities = EntityScores.of(*rows)
        found |= {f"entity_{score}": entities.score(score) for score in SCORES}
        if by_type:
            found |= {f"{score}.{type}": entities.score(score, type) for type in entities.counts for score in SCORES}
    hits = [sum(p == r for p, r in zip(*pair)) for pair in zip(*rows)]
    return found | {"accuracy": PooledShare(hits, [len(right) for right in rows.right])}


def _text(example: Example) -> Any:
    return example.ids[example.weights == 0]
