"""Compares a model that tags or embeds with its base on held-out rows: values with intervals, and their difference.

The base of tags is the commonest tag of the training rows, since a base without a head has none to give; that of
embeddings is the base itself, pooled likewise; that of rewards is the base's own head, or else a coin.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.data.batch import Example
from veneer.data.labelled import LabelledRenderer
from veneer.engine.classifier import ClassifierEngine
from veneer.engine.embedder import EmbeddingEngine
from veneer.engine.token_classifier import TokenClassifierEngine
from veneer.evaluation.classification import scores_of
from veneer.evaluation.embedding import retrieve
from veneer.evaluation.entities import EntityScores
from veneer.evaluation.metrics.metric import MetricResult, ShareRight
from veneer.evaluation.metrics.resampled import RowMean
from veneer.evaluation.tagging import SCORES, TaggedRows, tag_rows, tag_scores
from veneer.machine.batching import Batching
from veneer.training.intervals import Interval
from veneer.training.pair_values import ACCURACIES, MARGINS


@dataclass(frozen=True)
class JudgedTask:
    """Metrics of a model on held-out rows.

    Attributes:
        rows: number of rows.
        compared_with: name of the base of the comparison.
        metrics: by name, `base`, `tuned` and their `difference`: value, low and high. The first one decides.
        by_type: number, precision, recall and F1 of each type of entity.
        lines: a line of each row, for samples.jsonl.
    """

    rows: int
    compared_with: str
    metrics: dict[str, dict[str, dict[str, float]]]
    by_type: dict[str, dict[str, Any]]
    lines: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        found = {"rows": self.rows, "compared_with": self.compared_with, "metrics": self.metrics}
        return found | ({"by_type": self.by_type} if self.by_type else {})


def judge_tags(
    renderer: LabelledRenderer,
    engine: TokenClassifierEngine,
    train: Sequence[Example],
    rows: Sequence[Example],
    batching: Batching,
) -> JudgedTask:
    """Compare predicted tags with right ones, beside the commonest tag of the training rows."""
    tuned = tag_rows(engine, rows, renderer.labels, batching)
    assert tuned is not None
    counts = Counter(int(tag) for example in train for tag in example.ids[example.weights > 0])
    most = renderer.labels[counts.most_common(1)[0][0]]
    base = TaggedRows([[most] * len(tags) for tags in tuned.right], tuned.right)
    scores = tag_scores(tuned, renderer.labels, by_type=False)
    found = _compared(tag_scores(base, renderer.labels, by_type=False), scores)
    by_type: dict[str, dict[str, Any]] = {}
    if "entity_f1" in scores:
        entities = EntityScores.of(*tuned)
        for name in entities.counts:
            of_type = {score: entities.score(score, name).interval.as_dict() for score in SCORES}
            by_type[name] = {"entities": entities.support(name), **of_type}
    lines = [
        {"place": example.place, "tags": right, "predicted": predicted}
        for example, predicted, right in zip(rows, *tuned, strict=True)
    ]
    return JudgedTask(len(rows), f"the commonest tag of the training rows, {most}", found, by_type, lines)


def judge_embeddings(engine: EmbeddingEngine, rows: Sequence[Example], batching: Batching) -> JudgedTask:
    """Compare what the embeddings of the adapter find with what the base's find."""
    tuned = retrieve(engine, rows, batching)
    with engine.adapter_off():
        base = retrieve(engine, rows, batching)
    assert tuned is not None
    assert base is not None
    before, after = base["mrr"], tuned["mrr"]
    assert isinstance(before, RowMean)
    assert isinstance(after, RowMean)
    lines = [
        {"place": example.place, "rank": {"base": round(1 / was), "tuned": round(1 / now)}}
        for example, was, now in zip(rows, before.values, after.values, strict=True)
    ]
    return JudgedTask(len(rows), "the base itself", _compared(base, tuned), {}, lines)


def judge_rewards(
    engine: ClassifierEngine, rows: Sequence[Example], batching: Batching, base_has_head: bool
) -> JudgedTask:
    """Measure how many pairs have the higher reward on the chosen answer, and by how much.

    Args:
        engine: engine of a reward model.
        rows: answers, of which each two are a pair, the chosen one first.
        batching: answers at a time.
        base_has_head: whether the base gave rewards before training.
    """
    texts = [row.ids[:-1].tolist() for row in rows]
    rewards_P2 = scores_of(texts, engine, batching).view(-1, 2).tolist()
    tuned = _of_pairs(rewards_P2)
    if base_has_head:
        with engine.adapter_off():
            base = _of_pairs(scores_of(texts, engine, batching).view(-1, 2).tolist())
        metrics, compared_with = _compared(base, tuned), "the base's own head"
    else:
        metrics, compared_with = {name: {"tuned": found.interval.as_dict()} for name, found in tuned.items()}, "a coin"
        share = metrics[ACCURACIES]["tuned"]
        metrics[ACCURACIES] |= {
            "base": Interval(0.5, 0.5, 0.5).as_dict(),
            "difference": {end: value - 0.5 for end, value in share.items()},
        }
    lines = [
        {"place": example.place, "chosen": chosen, "rejected": rejected}
        for example, (chosen, rejected) in zip(rows[::2], rewards_P2, strict=True)
    ]
    return JudgedTask(len(rewards_P2), compared_with, metrics, {}, lines)


def _of_pairs(rewards_P2: Sequence[Sequence[float]]) -> dict[str, MetricResult]:
    margins = [chosen - rejected for chosen, rejected in rewards_P2]
    return {ACCURACIES: ShareRight([margin > 0 for margin in margins]), MARGINS: RowMean(margins)}


def _compared(
    base: Mapping[str, MetricResult], tuned: Mapping[str, MetricResult]
) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {
            "base": base[name].interval.as_dict(),
            "tuned": tuned[name].interval.as_dict(),
            "difference": tuned[name].difference(base[name]).as_dict(),
        }
        for name in tuned
    }
