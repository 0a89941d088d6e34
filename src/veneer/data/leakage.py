"""Finds what training rows share with each other and with held-out rows: duplicates, and passages that leak.

All of it is decided after the rows were tokenized; the ledger counts what is left out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from veneer.config import Data, UserError
from veneer.data.ledger import Ledger
from veneer.data.row_parser import take_again
from veneer.data.screening.deduplication import Overlap, near_duplicates
from veneer.data.sources.find import DataSource
from veneer.data.split import Sides, equal_to_earlier
from veneer.data.tokens.corpus import Corpus

SHOWN = 5  # rows that a message shows


@dataclass(frozen=True)
class TokenizedFiles:
    """The files that a setting names: the format of each, and the tokens of all."""

    setting: str
    sources: list[DataSource]
    formats: list[str]
    corpus: Corpus


def find_duplicates(corpus: Corpus, data: Data, ledger: Ledger) -> Sides:
    """Find the rows that stay, and those of them that must stand on one side of a split."""
    near = np.fromfile(corpus.folder / "near.bin", np.uint32).astype(np.int64)
    repeats = equal_to_earlier(corpus.rows["hash"])
    nearly = (near != np.arange(len(near))) & ~repeats
    drop = np.zeros(len(near), dtype=bool)
    if data.duplicates != "keep":
        drop |= repeats
    if data.duplicates == "drop-near":
        drop |= nearly
    ledger.move("duplicate", int(drop.sum()))
    ledger.notes["near_duplicate_dropped"] += int((drop & nearly).sum())
    ledger.notes["near_duplicate_kept"] += int((nearly & ~drop).sum())
    ledger.notes["duplicate_kept"] += int((repeats & ~drop).sum())
    return Sides(np.flatnonzero(~drop), np.empty(0, np.int64), near)


def leave_out_held_out(
    given: TokenizedFiles, held_out: TokenizedFiles, kept: Sides, data: Data, ledger: Ledger
) -> Sides:
    """Leave out training rows that are in the held-out files, or nearly."""
    both = [given.corpus, held_out.corpus]
    count = len(both[0].rows)

    def load(start: int, stop: int) -> Any:
        parts = [both[0].signatures(min(start, count), min(stop, count))]
        parts.append(both[1].signatures(max(start, count) - count, max(stop, count) - count))
        return np.concatenate(parts)

    near = near_duplicates(count + len(both[1].rows), load)
    known = np.isin(near[:count], near[count:]) | np.isin(both[0].rows["hash"], both[1].rows["hash"])
    inside = known[kept.train]
    ledger.notes["in_held_out_file"] += int(inside.sum())
    train = kept.train
    if data.duplicates != "keep" and inside.any():
        train = train[~inside]
        ledger.move("duplicate", int(inside.sum()))
    if not len(train):
        raise UserError(
            "data.validation: every training row stands in the held-out files too",
            "name other files in data.validation, or set data.duplicates=keep to measure memory",
        )
    if data.group is not None:
        shared = np.isin(both[0].rows["group"][train], both[1].rows["group"])
        ledger.notes["in_held_out_group"] += int(shared.sum())
    return Sides(train, np.arange(len(both[1].rows)), near)


def report_overlap(given: TokenizedFiles, held_out: TokenizedFiles, sides: Sides, data: Data, ledger: Ledger) -> None:
    """Report, or refuse, held-out rows that share a passage with training rows."""
    turns = list(take_again(held_out.sources, held_out.formats, held_out.setting, data, None))
    overlap = Overlap([conversation.text() for _, conversation in turns])
    wanted = numbers_of(given.corpus, sides.train)
    texts: list[str] = []
    for _, conversation in take_again(given.sources, given.formats, given.setting, data, wanted):
        texts.append(conversation.text())
        if len(texts) == 1000:
            overlap.look(texts)
            texts = []
    overlap.look(texts)
    places = [turns[n][1].place for n in overlap.rows()]
    ledger.overlap = {"rows": len(places), "of": len(turns), "places": places[:100]}
    if places and data.overlap == "refuse":
        raise UserError(
            f"data.validation: {len(places)} of {len(turns)} held-out rows share 13 words in a row with training rows: "
            + ", ".join(places[:SHOWN]),
            "take these rows out of either side, or set data.overlap to report",
        )


def numbers_of(corpus: Corpus, rows: Any) -> dict[int, Any]:
    """The numbers of some rows, rising, by source."""
    chosen_rows = corpus.rows[rows]
    return {
        int(source): np.sort(chosen_rows["number"][chosen_rows["source"] == source])
        for source in np.unique(chosen_rows["source"])
    }
