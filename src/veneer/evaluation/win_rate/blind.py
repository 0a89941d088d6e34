"""A blind vote: pairs in an order and with sides that the voter cannot know, and what the votes say once they are back.

Order and sides follow from a hash of the seed, the row and both answers, so that nothing has to be stored and no page
holds them: it names each pair by another part of the same hash. Votes come back with the hash of the whole ballot,
which only the same answers and the same seed give again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError
from veneer.config.files import read_json
from veneer.evaluation.win_rate.pairs import Pair, digest, pairs_digest
from veneer.evaluation.win_rate.win_rate import FIRST, SECOND, TIE, Outcome
from veneer.training.intervals import proportion

LEFT, RIGHT, SKIP = "left", "right", "skip"
VOTES = (LEFT, RIGHT, TIE, SKIP)
FIX = "save the votes of the page again, and name that file"


@dataclass(frozen=True)
class Item:
    """A pair as it is shown.

    Attributes:
        id: name of the pair in the page and in the votes.
        pair: the answers.
        is_swapped: whether the second answer stands on the left.
    """

    id: str
    pair: Pair
    is_swapped: bool


@dataclass(frozen=True)
class Votes:
    """What a person's votes say.

    Attributes:
        outcomes: rows that were voted on, and rows with equal answers that lie between them.
        facts: numbers of votes, of skipped and of open pairs, and how often the left answer won.
    """

    outcomes: list[Outcome]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Ballot:
    """Pairs to be voted on, and the seed of their order and sides."""

    pairs: Sequence[Pair]
    seed: int

    @property
    def id(self) -> str:
        return digest([pairs_digest(self.pairs), self.seed])

    @cached_property
    def items(self) -> list[Item]:
        """All pairs in their order; those with equal answers are not shown, but have their place."""
        found = []
        for number, pair in enumerate(self.pairs):
            hashed = hashlib.sha256(f"{self.seed} {number} {pair.id}".encode()).digest()
            found.append((hashed[16:], Item(hashed[:8].hex(), pair, bool(hashed[8] & 1))))
        return [item for _, item in sorted(found, key=lambda one: one[0])]

    def shown(self) -> list[dict[str, str]]:
        """Return what the page may hold of each pair: nothing that says which answer is whose."""
        return [
            {
                "id": item.id,
                "prompt": item.pair.prompt,
                LEFT: item.pair.second if item.is_swapped else item.pair.first,
                RIGHT: item.pair.first if item.is_swapped else item.pair.second,
            }
            for item in self.items
            if not item.pair.is_same
        ]

    def read(self, file: Path) -> Votes:
        """Read votes that were cast on this ballot.

        Raises:
            UserError: The file holds no votes, or votes on other answers or with another seed.
        """
        found = read_json(file, "ballot", "votes", fix=FIX)
        if found["ballot"] != self.id:
            raise UserError(
                f"{file}: its votes are on other answers, or on a page with another seed than {self.seed}",
                "use the options with which the page was made (--rows, --seed, --answers, --samples, --against); "
                "if the run was evaluated anew since, make a new page",
            )
        votes = found["votes"]
        items = [item for item in self.items if not item.pair.is_same]
        if not isinstance(votes, dict) or set(votes) - {item.id for item in items}:
            raise UserError(f"{file}: damaged: it votes on pairs that the page does not hold", FIX)
        for name, vote in votes.items():
            if vote not in VOTES:
                raise UserError(f"{file}: damaged: the vote on {name} is {json.dumps(vote)[:60]}", FIX)
        return self._unblinded(votes)

    def _unblinded(self, votes: dict[str, str]) -> Votes:
        """Match votes with answers.

        Rows with equal answers tie. Of a vote that ended early only those count that come before the last pair that was
        voted on, since they would outweigh the others otherwise.
        """
        places = [n for n, item in enumerate(self.items) if item.id in votes]
        is_whole = len(votes) == sum(not pair.is_same for pair in self.pairs)
        reached = self.items if is_whole else self.items[: max(places, default=-1) + 1]
        outcomes = []
        for item in reached:
            vote = TIE if item.pair.is_same else votes.get(item.id, SKIP)
            if vote == TIE:
                outcomes.append(Outcome(item.pair, TIE))
            elif vote != SKIP:
                outcomes.append(Outcome(item.pair, SECOND if (vote == LEFT) == item.is_swapped else FIRST))
        sides = [vote for vote in votes.values() if vote in (LEFT, RIGHT)]
        facts = {
            "equal_answers": sum(item.pair.is_same for item in reached),
            "votes": len(votes),
            "skipped": list(votes.values()).count(SKIP),
            "open": sum(not pair.is_same for pair in self.pairs) - len(votes),
            "left_wins": proportion(sides.count(LEFT), len(sides)).as_dict() if sides else None,
        }
        return Votes(outcomes, facts)
