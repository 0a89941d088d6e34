"""Base against tuned on the items of suites: a difference for each suite, and what was forgotten over all abilities.

Each item is right or wrong, and the same items are asked of both models, so `paired` (evaluation/paired.py) judges a
suite as it judges held-out rows. Forgetting is the mean over suites of the share that was lost, and counts each suite
once. Suites share no item, so their errors are independent, and the interval of their mean comes from theirs by adding
squares of the distances to each bound (MOVER: Zou and Donner 2008), as Newcombe's own interval of a difference does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.data.conversation import Conversation, Message
from veneer.evaluation.metrics.metric import ShareRight
from veneer.evaluation.paired import paired
from veneer.evaluation.responder import Progress, Responder
from veneer.evaluation.suites import ABILITIES
from veneer.evaluation.suites.suite import Item, Suite
from veneer.training.intervals import Interval

FLOOR = 0.1  # a base with a smaller share right has little to lose


@dataclass(frozen=True)
class SuiteScore:
    """The answers of one model to a suite.

    Attributes:
        suite: the suite.
        answers: one to each item.
    """

    suite: Suite
    answers: Sequence[str]

    @property
    def right(self) -> list[bool]:
        """Whether each answer is right."""
        return [self.suite.is_right(item, answer) for item, answer in zip(self.suite.items, self.answers, strict=True)]


@dataclass(frozen=True)
class SuiteComparison:
    """One suite, answered by base and tuned model."""

    base: SuiteScore
    tuned: SuiteScore

    @property
    def suite(self) -> Suite:
        return self.base.suite

    @property
    def difference(self) -> Interval:
        """Share right of the tuned model less that of the base, with its 95% interval."""
        return paired(self.base.right, self.tuned.right).difference

    def as_dict(self) -> dict[str, Any]:
        """Return what evaluation.json keeps of the suite."""
        base, tuned = ShareRight(self.base.right), ShareRight(self.tuned.right)
        return {
            "unit": base.unit,
            "base": base.interval.as_dict(),
            "tuned": tuned.interval.as_dict(),
            **paired(base.true, tuned.true).as_dict(),
            "shows": self.suite.shows,
            "cannot_show": self.suite.cannot_show,
        }

    def samples(self) -> list[dict[str, Any]]:
        """Return each item with both answers and whether they are right."""
        return [
            {
                "suite": self.suite.name,
                "prompt": item["prompt"],
                "base": base,
                "tuned": tuned,
                "base_right": base_right,
                "tuned_right": tuned_right,
            }
            for item, base, tuned, base_right, tuned_right in zip(
                self.suite.items,
                self.base.answers,
                self.tuned.answers,
                self.base.right,
                self.tuned.right,
                strict=True,
            )
        ]


def answer_suites(
    suites: Sequence[Suite], responder: Responder, on_done: Progress = lambda done: None
) -> list[SuiteScore]:
    """Let one model answer suites, without the system prompt of its run: what is measured is beside its task.

    A model without a chat template reads the prompt and a line break, and goes on.

    Args:
        suites: Suites to ask; those by choice need a responder with losses.
        responder: The model.
        on_done: Callback that gets the number of items just answered.
    """
    plain = responder.without_system_prompt()
    return [SuiteScore(suite, _answers(suite, plain, on_done)) for suite in suites]


def _answers(suite: Suite, responder: Responder, on_done: Progress) -> list[str]:
    """Return a greedy answer to each item, or the likeliest of its choices, as the suite asks."""
    end = "" if responder.is_chat else "\n"
    asked = [Conversation((Message("user", item["prompt"] + end),), item["prompt"]) for item in suite.items]
    if not suite.by_choice:
        return responder.answer(asked, suite.max_new_tokens, on_done)
    answers = _likeliest(suite.items, asked, responder)
    on_done(len(answers))
    return answers


def _likeliest(items: Sequence[Item], asked: Sequence[Conversation], responder: Responder) -> list[str]:
    """Return the choice of each item whose text, with the end of the turn, has the least loss."""
    rows = [
        replace(row, messages=(*row.messages, Message("assistant", choice)))
        for row, item in zip(asked, items, strict=True)
        for choice in item["choices"]
    ]
    losses = iter(responder.answer_losses(rows))
    answers = []
    for item in items:
        of_choices = [next(losses) for _ in item["choices"]]
        answers.append(item["choices"][of_choices.index(min(of_choices))])
    return answers


def pair_suites(base: Sequence[SuiteScore], tuned: Sequence[SuiteScore]) -> list[SuiteComparison]:
    """Pair the scores of two models on the same suites."""
    return [SuiteComparison(*scores) for scores in zip(base, tuned, strict=True)]


def forgetting(compared: Sequence[SuiteComparison]) -> dict[str, Any] | None:
    """Compute the mean loss over the suites of abilities.

    Returns:
        `unit`, `value`, `low` and `high` (a loss is positive), `rows` and `suites`: how many items and suites it is
        over, `little_to_lose`: those of them that the base can hardly do, so that they could show no loss, and `line`:
        all of it in a sentence; None: none of them was asked.
    """
    asked = [pair for pair in compared if pair.suite in ABILITIES]
    if not asked:
        return None
    found = mean_loss([pair.difference for pair in asked])
    weak = [pair.suite.name for pair in asked if ShareRight(pair.base.right).interval.value < FLOOR]
    return {
        "unit": "share",
        **found.as_dict(),
        "rows": sum(len(pair.base.answers) for pair in asked),
        "suites": len(asked),
        "little_to_lose": weak,
        "line": forgetting_line(found, len(asked)),
    }


def mean_loss(differences: Sequence[Interval]) -> Interval:
    """Compute the mean of independent losses with its 95% interval; a difference is the loss with another sign."""
    count = len(differences)
    value = -sum(each.value for each in differences) / count
    down = math.sqrt(sum((each.high - each.value) ** 2 for each in differences)) / count
    up = math.sqrt(sum((each.value - each.low) ** 2 for each in differences)) / count
    return Interval(value, value - down, value + up)


def forgetting_line(loss: Interval, suites: int) -> str:
    """Return the alignment tax in one line: "forgetting: 1.8 points (0.4 to 3.1) over 4 suites"."""
    value, low, high = (f"{100 * share:.1f}" for share in (loss.value, loss.low, loss.high))
    return f"forgetting: {value} points ({low} to {high}) over {suites} suite{'s' if suites > 1 else ''}"
