"""An answer that is exactly what training taught is right: calls, reasoning and plain text."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.rows import conversation, renderer
from tests.support.tiny import tiny_tokenizer
from veneer.config import Evaluate
from veneer.data.conversation import Conversation, Message
from veneer.evaluation.decoding import answer_text, expected_answer
from veneer.evaluation.examples import examples_of
from veneer.evaluation.metrics import right_rows
from veneer.evaluation.metrics.exact_match import is_right
from veneer.evaluation.metrics.metric import Sample

TEMPLATES = Path(__file__).parent / "templates"
CALL = {"name": "lamp", "arguments": {"on": True}}
ROWS = [
    (Message("assistant", "the cat"), "the cat"),
    (Message("assistant", "", tool_calls=(CALL,)), f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"),
    (Message("assistant", "the cat", reasoning="I think"), "<think>\nI think\n</think>\n\nthe cat"),
    (Message("assistant", "a <|im_end|> b"), "a <|im_end|> b"),
    (Message("assistant", "the cat", weight=0.0), "the cat"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), ROWS)
@pytest.mark.parametrize("settings", [{}, {"loss_on": "all"}, {"chat_template": str(TEMPLATES / "qwen-2.5.jinja")}])
def test_the_answer_expected_is_the_one_that_was_trained(answer: Any, expected: str, settings: dict[str, str]) -> None:
    made = renderer(**settings)
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    row = Conversation((*turns, answer), "p")
    assert expected_answer(made, row) == expected
    # What a perfect model generates: the tokens behind the prompt, up to the end token.
    ids = made.example(row).ids[len(made.prompt_ids(turns)) :].tolist()
    assert is_right(answer_text(tiny_tokenizer(), ids[: len(made.answer_ids(row))]), expected_answer(made, row))


def test_what_a_template_writes_into_an_answer_is_expected_too() -> None:
    row = conversation([("user", "a"), ("assistant", "blue")])
    expected = expected_answer(renderer(chat_template=str(TEMPLATES / "qwen-3.jinja")), row)
    assert is_right(expected, expected)
    assert is_right("<think>\n\n</think>\n\nblue", expected)
    assert not is_right("<think>\nblue", expected)
    assert expected_answer(renderer(chat_template="none"), conversation([("user", "a"), ("assistant", " b")])) == "b"


def test_reasoning_does_not_decide_and_calls_are_compared_as_json() -> None:
    assert is_right("<think>\nx\n</think>\n\nblue", "<think>\ny\n</think>\n\nblue")
    assert not is_right("<think>\nx\n</think>\n\nred", "<think>\nx\n</think>\n\nblue")
    call = '<tool_call>\n{"name": "a", "arguments": {"n": 1, "m": 2}}\n</tool_call>'
    assert is_right('<tool_call>{"arguments":{"m":2,"n":1},"name":"a"}</tool_call>', call)
    assert not is_right(call.replace("1", "true"), call)
    assert not is_right("Well. " + call, call)
    assert not is_right(call + call, call)
    samples = [Sample("", "", '{"a": 1}', answer) for answer in ('<think>\n</think>\n{ "a": 1}', '{"a": 2}')]
    assert right_rows(samples, Evaluate()) == [True, False]


def test_examples_before_a_question_keep_their_calls() -> None:
    row = Conversation((Message("user", "a"), Message("assistant", "", tool_calls=(CALL,))), "p")
    assert examples_of([row], 1)[1].tool_calls == (CALL,)
