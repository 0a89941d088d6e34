"""Examples for a prompt are training rows, chosen by a rule and not by eye."""

from collections.abc import Sequence
from typing import Any

from veneer.data.conversation import Conversation, Message
from veneer.evaluation.metrics.json_values import json_object


def examples_of(rows: Sequence[Conversation], count: int) -> list[Message]:
    """Choose the first training rows whose answers differ in every key, as turns to stand before a question.

    The rule gives a model as much to see as so few rows can: each value it is shown is another. Where the answers are
    not JSON objects, or too few rows differ so, the first rows are taken that are not chosen yet.

    Args:
        rows: Training rows of one question and one answer.
        count: Number of rows to choose.
    """
    chosen: list[int] = []
    for n, row in enumerate(rows):
        answer = json_object(row.reference())
        if answer and all(_differ(answer, json_object(rows[m].reference()) or {}) for m in chosen):
            chosen.append(n)
    chosen += [n for n in range(len(rows)) if n not in chosen]
    turns = []
    for n in chosen[:count]:
        prompt = rows[n].prompt()
        turns += [message for message in prompt if message.role != "system"]
        turns.append(rows[n].messages[len(prompt)])
    return turns


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] != other.get(key) for key in one)
