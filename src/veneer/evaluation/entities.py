"""Finds entities in tags, and compares predicted ones with right ones: precision, recall and F1 by type and in all.

An entity counts as found where its first word, its last and its type are right, as in CoNLL-2003's evaluation (Tjong
Kim Sang and De Meulder 2003) and in the library seqeval, whose figures these are. That library had its last release in
2020; the rules are a dozen lines, so they stand here.

An entity begins at B, S and U, and at any other tag that does not go on with the one before: so the older IOB scheme,
in which most entities begin with I, gives the same entities.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from veneer.evaluation.metrics.resampled import PooledShares

FOUND, PREDICTED, RIGHT = 0, 1, 2  # columns of counts


class Entity(NamedTuple):
    """Type, first word, and the word behind the last."""

    type: str
    start: int
    end: int


def find_entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of a row of tags, in their order."""
    found: list[Entity] = []
    before = "O"
    for at, tag in enumerate(tags):
        if tag[:2] in ("I-", "E-", "L-") and before[:2] in ("B-", "I-") and before[2:] == tag[2:]:
            found[-1] = found[-1]._replace(end=at + 1)
        elif tag != "O":
            found.append(Entity(tag[2:], at, at + 1))
        before = tag
    return found


@dataclass(frozen=True)
class EntityScore(PooledShares):
    """A score of entities over all rows together; its interval draws whole rows.

    Attributes:
        counts_RK: entities of each row: found rightly, predicted, right ones; float, shape (rows, 3).
        score: precision, recall or f1.
    """

    counts_RK: Any
    score: str

    def counts(self) -> Any:
        return self.counts_RK

    def statistic(self, sums_SK: Any) -> Any:
        found, predicted, right = sums_SK[:, FOUND], sums_SK[:, PREDICTED], sums_SK[:, RIGHT]
        of = {"precision": predicted, "recall": right, "f1": (predicted + right) / 2}[self.score]
        return np.divide(found, of, out=np.zeros_like(found), where=of > 0)  # 0 where nothing is there, as in seqeval


@dataclass(frozen=True)
class EntityScores:
    """Scores of all entities and of each type.

    Attributes:
        counts: `EntityScore.counts_RK` of each type.
        rows: number of rows.
    """

    counts: dict[str, Any]
    rows: int

    @classmethod
    def of(cls, predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> "EntityScores":
        """Compare predicted tags with right ones, row by row."""
        rows = [(Counter(find_entities(p)), Counter(find_entities(r))) for p, r in zip(predicted, right, strict=True)]
        types = sorted({entity.type for pair in rows for side in pair for entity in side})
        counts = {name: np.zeros((len(rows), 3)) for name in types}
        for row, (theirs, ours) in enumerate(rows):
            for column, entities in enumerate((theirs & ours, theirs, ours)):
                for entity in entities:
                    counts[entity.type][row, column] += 1
        return cls(counts, len(rows))

    def score(self, score: str, type: str | None = None) -> EntityScore:
        """Return precision, recall or f1 of a type; None: of all types together."""
        counts_RK = self.counts[type] if type is not None else sum(self.counts.values(), np.zeros((self.rows, 3)))
        return EntityScore(counts_RK, score)

    def support(self, type: str) -> int:
        """Return the number of right entities of a type."""
        return int(self.counts[type][:, RIGHT].sum())
