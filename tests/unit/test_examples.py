"""Examples for a prompt are chosen by rule: the first rows whose answers differ in every key."""

import json

from veneer.data.conversation import Conversation, Message
from veneer.evaluation.examples import examples_of


def row(name: str, answer: str) -> Conversation:
    return Conversation((Message("system", "s"), Message("user", name), Message("assistant", answer)))


def asked(turns: list[Message]) -> str:
    assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2), (
        "system prompts stay where they are"
    )
    return "".join(turn.content for turn in turns[::2])


def test_the_first_rows_that_differ_in_every_key() -> None:
    values = [("a", "x", 1), ("b", "x", 2), ("b", "y", 1), ("b", "y", 2), ("c", "y", 3), ("c", "z", 3)]
    rows = [row(str(n), json.dumps(dict(zip("tup", answer, strict=True)))) for n, answer in enumerate(values)]
    assert asked(examples_of(rows, 3)) == "035"
    assert asked(examples_of(rows, 2)) == "03"
    assert asked(examples_of(rows, 5)) == "03512", "then the first that are left"
    assert examples_of(rows, 1)[1].content == rows[0].reference()


def test_other_answers_are_taken_in_order() -> None:
    rows = [row("a", "yes"), row("b", "no"), row("c", "[1]")]
    assert asked(examples_of(rows, 2)) == "ab"
    assert examples_of([], 3) == []
