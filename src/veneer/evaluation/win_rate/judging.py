"""Asks a judge about each pair in both positions, and keeps every judgment as it comes.

A judge may prefer what it reads first. So each pair is asked twice, with the answers swapped, and only an answer that
wins in both positions has won; a judge that contradicts itself has not told the answers apart, which is a tie. How
often it does, and how often the answer shown first wins, is reported. Equal answers tie without being asked about.

Judgments are appended to a file in the run's folder, one a line, whose name is a hash of all that decides them. The
same call reads them again and asks what is missing: an interrupted one goes on, and a finished one asks nothing.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.config.errors import JobError
from veneer.config.files import read_json_lines, reading
from veneer.config.folder import make_folder, write_text
from veneer.evaluation.win_rate.pairs import Pair
from veneer.evaluation.win_rate.prompt import VERDICTS, parse_verdict
from veneer.evaluation.win_rate.win_rate import FIRST, SECOND, TIE, Outcome
from veneer.machine.concurrent import as_they_come
from veneer.training.intervals import proportion

MOST_UNREADABLE = 0.1  # share of judgments without a verdict beyond which there is no result
SHOWN = 300  # characters of a reply that a message shows
FIX = "move it away: what it holds is asked again"
Question = tuple[Pair, bool]  # and whether its answers are swapped


class NotAnswered(RuntimeError):  # noqa: N818 - it fails one question and not the job
    """The judge's server refuses one question, such as one that is too long."""


@dataclass(frozen=True)
class Judgment:
    """The judge's answer to one question.

    Attributes:
        pair: id of the pair.
        place: place of the row.
        is_swapped: whether the second answer was shown as A.
        verdict: A, B or tie; None: it could not be read.
        reply: text of the judge, or why there is none.
    """

    pair: str
    place: str
    is_swapped: bool
    verdict: str | None
    reply: str

    @property
    def winner(self) -> str:
        """The answer that it prefers: first, second or tie."""
        if self.verdict == TIE:
            return TIE
        return SECOND if (self.verdict == "A") == self.is_swapped else FIRST


class KeptJudgments:
    """Judgments that are appended to a file, by pair and position; those without a verdict are asked again.

    Args:
        path: The file; what it holds is read.

    Raises:
        UserError: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[tuple[str, bool], Judgment] = {}
        if path.exists():
            lines = read_json_lines(path, *Judgment.__dataclass_fields__, fix=FIX, is_appended=True)
            with reading(f"{path}: damaged", FIX):
                found = [Judgment(**{key: line[key] for key in Judgment.__dataclass_fields__}) for line in lines]
                self.known = {(one.pair, one.is_swapped): one for one in found if one.verdict in VERDICTS.values()}
            write_text(path, "".join(map(_line, self.known.values())))  # without a last line that was cut

    def add(self, judgment: Judgment) -> None:
        """Append a judgment."""
        make_folder(self.path.parent)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(judgment))
        if judgment.verdict is not None:
            self.known[judgment.pair, judgment.is_swapped] = judgment


@dataclass(frozen=True)
class JudgedPairs:
    """What a judge said of all pairs.

    Attributes:
        outcomes: rows with a verdict in both positions, or with equal answers.
        facts: consistency of the judge: its disagreement with itself, and how often the answer shown first won.
    """

    outcomes: list[Outcome]
    facts: dict[str, Any]


def missing_questions(pairs: Sequence[Pair], kept: KeptJudgments) -> list[Question]:
    """Return what is left to be asked: both positions of pairs whose answers differ."""
    both = [(pair, is_swapped) for pair in pairs if not pair.is_same for is_swapped in (False, True)]
    return [(pair, is_swapped) for pair, is_swapped in both if (pair.id, is_swapped) not in kept.known]


def judge_pairs(
    pairs: Sequence[Pair],
    ask: Callable[[Pair, bool], str],
    kept: KeptJudgments,
    at_once: int = 1,
    on_done: Callable[[int], None] = lambda done: None,
) -> JudgedPairs:
    """Have all pairs judged, and match the judgments of both positions.

    Args:
        pairs: Answers to each row.
        ask: Function that asks the judge about a pair, swapped or not; it may raise NotAnswered.
        kept: Judgments that are known; new ones are added.
        at_once: Number of concurrent questions.
        on_done: Callback that gets the number of questions just answered.

    Raises:
        JobError: More than `MOST_UNREADABLE` of all judgments have no verdict.
    """
    asked = 2 * sum(not pair.is_same for pair in pairs)
    unreadable: list[Judgment] = []

    def judgment(question: Question) -> Judgment:
        pair, is_swapped = question
        try:
            reply = ask(pair, is_swapped)
        except NotAnswered as error:
            return Judgment(pair.id, pair.place, is_swapped, None, str(error))
        return Judgment(pair.id, pair.place, is_swapped, parse_verdict(reply), reply)

    for found in as_they_come(judgment, missing_questions(pairs, kept), at_once):
        kept.add(found)
        on_done(1)
        if found.verdict is None:
            unreadable.append(found)
        if len(unreadable) > MOST_UNREADABLE * asked:
            raise JobError(
                f"{len(unreadable)} of {asked} judgments have no verdict, and at most {MOST_UNREADABLE:.0%} may have "
                f"none; {found.place}: {' '.join(found.reply.split())[-SHOWN:] or 'an empty reply'}\n"
                "  fix: ask another judge, or allow longer replies with --max-new-tokens; all verdicts are kept"
            )
    return _matched(pairs, kept, asked, len(unreadable))


def _matched(pairs: Sequence[Pair], kept: KeptJudgments, asked: int, unreadable: int) -> JudgedPairs:
    outcomes = [Outcome(pair, TIE) for pair in pairs if pair.is_same]
    disagreeing = twice = 0
    verdicts: list[str | None] = []
    for pair in pairs:
        both = [kept.known[key] for is_swapped in (False, True) if (key := (pair.id, is_swapped)) in kept.known]
        verdicts += [one.verdict for one in both]
        if len(both) == 2:
            winner, other = (one.winner for one in both)
            twice += 1
            disagreeing += winner != other
            outcomes.append(Outcome(pair, winner if winner == other else TIE))
    decided = len(verdicts) - verdicts.count(TIE)
    facts = {
        "equal_answers": len(pairs) - asked // 2,
        "judgments": asked,
        "unreadable": unreadable,
        "disagreement": proportion(disagreeing, twice).as_dict() if twice else None,
        "first_shown_wins": proportion(verdicts.count("A"), decided).as_dict() if decided else None,
    }
    return JudgedPairs(outcomes, facts)


def _line(judgment: Judgment) -> str:
    return json.dumps(asdict(judgment)) + "\n"
