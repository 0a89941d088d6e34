"""The win rate of pairs: its numbers, its interval, groups, and what is read of a judge's reply."""

import random

import pytest

from veneer.config import UserError
from veneer.evaluation.paired import difference
from veneer.evaluation.win_rate.pairs import Pair
from veneer.evaluation.win_rate.prompt import judge_prompt, parse_verdict
from veneer.evaluation.win_rate.win_rate import FIRST, SECOND, TIE, Outcome, win_rate


def outcomes(wins: int, ties: int, losses: int, group: int = 0) -> list[Outcome]:
    """Outcomes in which the second answer is longer; every `group` rows share a group."""
    winners = [SECOND] * wins + [TIE] * ties + [FIRST] * losses
    return [
        Outcome(Pair(f"a:{n}", "q", "one", "three", group=str(n // group) if group else None), winner)
        for n, winner in enumerate(winners)
    ]


def test_ties_count_half_and_the_interval_is_that_of_the_paired_difference() -> None:
    found = win_rate(outcomes(12, 24, 4))
    assert (found.rows, found.wins, found.ties, found.losses) == (40, 12, 24, 4)
    assert found.interval.value == (12 + 24 / 2) / 40
    tango = difference(40, 12, 4)
    assert (found.interval.low, found.interval.high) == ((1 + tango.low) / 2, (1 + tango.high) / 2)
    assert found.as_dict()["longer_wins"]["value"] == 12 / 16


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [((6, 34, 0), "better"), ((0, 34, 6), "worse"), ((5, 35, 0), "not shown"), ((30, 0, 10), "better")],
)
def test_the_verdict_needs_interval_and_sign_test(counts: tuple[int, int, int], verdict: str) -> None:
    assert win_rate(outcomes(*counts)).verdict == verdict


def test_no_difference_is_equal_within_what_could_have_been_seen() -> None:
    found = win_rate(outcomes(50, 300, 50))
    assert found.verdict == f"equal within {found.detectable:.3g}"
    assert found.rows_needed is None


def test_rows_that_would_settle_it_do() -> None:
    found = win_rate(outcomes(24, 60, 16))
    assert found.verdict in ("not shown", f"equal within {found.detectable:.3g}")
    needed = found.rows_needed
    assert needed is not None
    times = 1.05 * needed / 100
    assert win_rate(outcomes(round(24 * times), round(60 * times), round(16 * times))).interval.low > 0.5


def test_rows_of_one_group_are_not_independent() -> None:
    alone, grouped = win_rate(outcomes(40, 20, 20)), win_rate(outcomes(40, 20, 20, group=10))
    assert grouped.interval.value == alone.interval.value
    assert grouped.interval.high - grouped.interval.low > 1.5 * (alone.interval.high - alone.interval.low)
    assert grouped.compared.groups == 8
    with pytest.raises(UserError, match="10 rows in one group"):
        win_rate(outcomes(10, 0, 0, group=10))


@pytest.mark.parametrize("judged", [[], outcomes(1, 0, 0)])
def test_fewer_than_two_rows_are_no_win_rate(judged: list[Outcome]) -> None:
    with pytest.raises(UserError, match="a win rate needs two"):
        win_rate(judged)


def test_the_interval_covers_the_truth() -> None:
    draw, held = random.Random(0), 0
    for _ in range(400):
        winners = draw.choices([SECOND, TIE, FIRST], [0.4, 0.3, 0.3], k=60)
        interval = win_rate([Outcome(Pair(str(n), "", "a", "b"), one) for n, one in enumerate(winners)]).interval
        held += interval.low <= 0.55 <= interval.high
    assert 0.92 * 400 <= held <= 0.98 * 400


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("verdict: A", "A"),
        ("Both are fine.\n\n**Verdict: b**\n", "B"),
        ("verdict: tie.", "tie"),
        ("<think>verdict: A</think>It is B.\nverdict: B", "B"),
        ("verdict: A or B", None),
        ("verdict: A\nthough B is good as well", None),
        ("A", None),
        ("The verdict: A", None),
        ("", None),
        ("verdict: C", None),
    ],
)
def test_a_verdict_is_the_last_line_or_none(reply: str, verdict: str | None) -> None:
    assert parse_verdict(reply) == verdict


def test_a_swapped_question_differs_in_the_positions_alone() -> None:
    pair = Pair("a:1", "Why {x}?", "{criterion}", "two", "right")
    straight, swapped = (judge_prompt(pair, is_swapped, "be brief") for is_swapped in (False, True))
    assert straight.index("{criterion}") < straight.index("two")
    assert swapped.index("two") < swapped.index("{criterion}")
    assert sorted(straight) == sorted(swapped)
    assert "right_answer" not in straight
