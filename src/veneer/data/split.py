"""Chooses the rows that are held out. Rows that are equal, nearly equal, or of one group stand on one side."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from veneer.config import UserError
from veneer.data.tokens.corpus import Corpus


@dataclass(frozen=True)
class Sides:
    """Rows by number, int64.

    Attributes:
        train, validation: The rows of either side, rising.
        cluster: For each row of the corpus the first row it is nearly equal to, or itself.
    """

    train: Any
    validation: Any
    cluster: Any


def equal_to_earlier(hashes: Any) -> Any:
    """Whether each row equals one before it; bool."""
    repeats = np.ones(len(hashes), dtype=bool)
    repeats[np.unique(hashes, return_index=True)[1]] = False
    return repeats


def split_rows(corpus: Corpus, kept: Sides, validation: float | int, seed: int) -> Sides:
    """A seeded split of the rows that are kept.

    Args:
        validation: A share of the rows, or a number.

    Raises:
        UserError: No row would be left to train on, or none could be held out.
    """
    rows = kept.train
    wanted = validation if isinstance(validation, int) else round(validation * len(rows))
    if validation and not wanted and len(rows) > 1:
        wanted = 1
    if wanted >= len(rows):
        raise UserError(
            f"data.validation = {validation}: {wanted} of {len(rows)} usable rows leave none to train on",
            f"set data.validation below {len(rows)}, or name a file",
        )
    clusters = _joined(kept.cluster[rows], corpus.rows["group"][rows])
    sizes = np.bincount(clusters)
    held_out = np.zeros(len(sizes), dtype=bool)
    count = 0
    for cluster in np.random.default_rng(seed).permutation(len(sizes)):
        if count == wanted:
            break
        if count + sizes[cluster] <= wanted:
            held_out[cluster] = True
            count += int(sizes[cluster])
    if wanted and not count:
        if len(sizes) == 1:
            reason, fix = f"the {len(rows)} rows are all alike", "set data.validation to 0"
        else:
            reason = f"the {len(rows)} rows form {len(sizes)} groups of like rows, the smallest of {sizes.min()}"
            fix = f"set data.validation to {sizes.min()} or more"
        raise UserError(f"data.validation = {validation}: no row can be held out: {reason}", f"{fix}, or name a file")
    aside = held_out[clusters]
    return Sides(rows[~aside], rows[aside], kept.cluster)


def _joined(clusters: Any, groups: Any) -> Any:
    """Clusters as numbers from 0, those that share a group joined; group 0 is no group."""
    _, labels = np.unique(clusters, return_inverse=True)
    if not groups.any():
        return labels
    # Let every cluster and every group take the smallest number among its rows until nothing changes.
    _, groups = np.unique(groups, return_inverse=True)
    while True:
        before = labels
        for members in (groups, clusters):
            _, members = np.unique(members, return_inverse=True)
            smallest = np.full(members.max() + 1, len(labels))
            np.minimum.at(smallest, members, labels)
            labels = smallest[members]
        if np.array_equal(labels, before):
            return np.unique(labels, return_inverse=True)[1]
