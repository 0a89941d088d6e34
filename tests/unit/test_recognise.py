"""Every format that is known: what is recognised, what a row becomes, and what is refused."""

from typing import Any

import pytest

from veneer.config import UserError
from veneer.data.conversation import BadRowError, Conversation, Message
from veneer.data.recognise import FORMATS, recognise, to_conversation
from veneer.data.turns import read_turns

ASK, SAY = Message("user", "what does the cat say"), Message("assistant", "the cat")
CALL = {"name": "search", "arguments": {"for": ["rice"]}}
HUMAN, GPT = {"from": "human", "value": ASK.content}, {"from": "gpt", "value": SAY.content}
USER, ASSISTANT = {"role": "user", "content": ASK.content}, {"role": "assistant", "content": SAY.content}

YES, NO = ASSISTANT | {"content": "yes"}, ASSISTANT | {"content": "no"}
TRANSCRIPT = f"\n\nHuman: {ASK.content}\n\nAssistant:"


def read(row: dict[str, Any], columns: Any = None) -> tuple[str, Conversation]:
    name, _ = recognise([row], "auto", columns or {}, "rows.jsonl:1")
    return name, to_conversation(row, name, columns or {})


def bad(row: dict[str, Any], wanted: str = "auto") -> str:
    name, _ = recognise([row], wanted, {}, "rows.jsonl:1")
    with pytest.raises(BadRowError) as caught:
        to_conversation(row, name, {})
    return str(caught.value)


def unknown(*rows: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        recognise(rows, "auto", {}, "rows.jsonl:1")
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"conversations": [USER, ASSISTANT]}, "messages"),
        ({"messages": [HUMAN, GPT]}, "sharegpt"),
        ({"conversations": [HUMAN, GPT], "id": 3}, "sharegpt"),
        ({"conversations": [HUMAN | {"from": "user"}, GPT | {"from": "chatgpt"}]}, "sharegpt"),
        ({"instruction": ASK.content, "input": "", "output": SAY.content, "text": "### Instruction: ..."}, "alpaca"),
        ({"prompt": ASK.content, "completion": SAY.content}, "prompt-completion"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt-completion"),
        ({"question": ASK.content, "answer": SAY.content}, "question-answer"),
        ({"text": f"### Human: {ASK.content}### Assistant: {SAY.content}"}, "guanaco"),
        ({"text": f"\n### Human: {ASK.content}\n### Assistant: {SAY.content}\n"}, "guanaco"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ASK.content}]}, ASSISTANT]}, "messages"),
    ],
)  # fmt: skip
def test_the_same_exchange_in_every_format(row: dict[str, Any], name: str) -> None:
    found, conversation = read(row)
    assert found == name
    assert [(m.role, m.content) for m in conversation.messages] == [(m.role, m.content) for m in (ASK, SAY)]


def test_alpacas_input_follows_its_instruction_and_its_history_comes_before() -> None:
    row = {"instruction": "sum", "input": "1 2", "output": "3", "system": "be brief", "history": [["a", "b"]]}
    _, conversation = read(row)
    said = [(m.role, m.content) for m in conversation.messages]
    assert said == [
        ("system", "be brief"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "sum\n\n1 2"),
        ("assistant", "3"),
    ]


def test_function_calls_and_observations_become_calls_and_tool_turns() -> None:
    turns = [
        HUMAN,
        {"from": "function_call", "value": '{"name": "search", "arguments": {"for": ["rice"]}}'},
        {"from": "observation", "value": '{"found": 2}'},
        GPT,
    ]
    _, conversation = read({"conversations": turns, "tools": '[{"name": "search", "parameters": {}}]'})
    assert conversation.messages[1] == Message("assistant", "", tool_calls=(CALL,))
    assert conversation.messages[2] == Message("tool", '{"found": 2}')
    assert conversation.tools == ({"type": "function", "function": {"name": "search", "parameters": {}}},)
    assert not conversation.is_empty


def test_openais_tool_calls_reasoning_and_weights() -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"for": ["rice"]}'}}
    turns = [
        {"role": "developer", "content": "be brief"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [called], "weight": 0},
        {"role": "tool", "tool_call_id": "c1", "name": "search", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning_content": "I count", "loss_weight": 0.5},
    ]
    _, conversation = read({"messages": turns})
    system, _, call, result, answer = conversation.messages
    assert system.role == "system"
    assert (call.tool_calls, call.weight) == ((CALL,), 0.0)
    assert (result.role, result.name) == ("tool", "search")
    assert (answer.content, answer.reasoning, answer.weight) == ("two", "I count", 0.5)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK.content, "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"conversations": [HUMAN], "chosen": GPT | {"value": "yes"}, "rejected": GPT | {"value": "no"}},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": ASK.content, "chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": f"{TRANSCRIPT} yes", "rejected": f"{TRANSCRIPT} no"},
    ],
)  # fmt: skip
def test_preference_pairs_part_at_the_last_answer(row: dict[str, Any]) -> None:
    name, conversation = read(row)
    assert name == "preference"
    assert [m.content for m in conversation.messages] == [ASK.content, "yes"]
    assert [m.content for m in conversation.rejected] == [ASK.content, "no"]
    assert to_conversation(row, "chosen", {}).rejected == ()


def test_rated_rows_keep_their_label() -> None:
    row = {"prompt": "a", "completion": "b", "label": False}
    assert read(row)[0] == "rated"
    assert read(row)[1].label is False
    assert read(row | {"label": "some text"})[0] == "prompt-completion"


def test_plain_text_is_a_document() -> None:
    name, conversation = read({"text": "Once upon a time", "url": "x"})
    assert (name, conversation.is_document, conversation.prompt(), conversation.reference()) == ("text", True, (), "")


def test_columns_map_any_names() -> None:
    row = {"query": "a", "reply": "b", "who": "be brief", "text": "c"}
    name, conversation = read(row, {"prompt": "query", "completion": "reply", "system": "who"})
    assert name == "prompt-completion"
    assert [m.content for m in conversation.messages] == ["be brief", "a", "b"]
    with pytest.raises(BadRowError, match=r"no column `reply` \(fields here: `query`\)"):
        to_conversation({"query": "a"}, name, {"prompt": "query", "completion": "reply"})


def test_an_ambiguous_file_lists_the_candidates() -> None:
    told = unknown({"prompt": "a", "completion": "b", "messages": []})
    assert "fit 2 formats: messages, prompt-completion" in told
    assert "set data.format to one of messages, prompt-completion" in told
    assert "messages, preference" in unknown({"messages": [USER], "chosen": [USER], "rejected": [USER]})
    assert "guanaco, text" in unknown({"text": "### Human: a### Assistant: b"}, {"text": "plain"})
    assert recognise([{"prompt": "a", "completion": "b", "messages": []}], "messages", {}, "")[0] == "messages"


def test_unknown_fields_say_what_is_known_and_how_to_map() -> None:
    told = unknown({"What is 2+2?": "4"})
    assert "fit no known format; is a header line missing?" in told
    assert "data.columns={prompt: ..., completion: ...}" in told
    assert all(name in told for name in FORMATS if name != "chosen")


@pytest.mark.parametrize(
    ("row", "wanted", "expected"),
    [
        ({"prompt": "c"}, "prompt-completion", "missing `completion`"),
        ({"prompt": "a", "completion": 3}, "auto", "`completion` must be text, this is int"),
        ({"prompt": None, "completion": "b"}, "auto", "`prompt` must be text, this is null"),
        ({"prompt": "\ud83d", "completion": "b"}, "auto", "`prompt` holds half a character"),
        ({"prompt": "a\0", "completion": "b"}, "auto", "`prompt` holds a NUL character"),
        ({"messages": [USER]}, "auto", "no turn of the assistant"),
        ({"messages": []}, "auto", "a conversation without turns"),
        ({"messages": "a"}, "auto", "`messages` must be a list of turns"),
        ({"messages": ["a"]}, "auto", "turn 1 needs `role` and `content`"),
        ({"messages": [{"role": "user"}, ASSISTANT]}, "auto", "turn 1 needs `role` and `content`"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "auto", "turn 1 has the role 'robot'; known roles: system"),
        ({"conversations": [{"from": ["x"], "value": "a"}]}, "auto", "turn 1 has the role ['x']"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "auto", "turns 2 and 3 are both the assistant's"),
        ({"messages": [USER | {"loss_weight": 1}, ASSISTANT]}, "auto", "only answers have a weight"),
        ({"messages": [USER, ASSISTANT | {"loss_weight": -1}]}, "auto", "a number of at least 0"),
        ({"messages": [USER, ASSISTANT | {"loss_weight": True}]}, "auto", "a number of at least 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, "auto", "'image_url'"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "search rice"}]}, "auto", "is not JSON"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{"id": 3}]}]}, "auto", "a tool call needs `name`"),
        ({"conversations": [HUMAN, GPT], "tools": "x"}, "auto", "`tools` is not JSON"),
        ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "auto", "nothing to learn"),
        ({"text": "before ### Human: a"}, "guanaco", "begins before the first marker"),
        ({"chosen": "a", "rejected": "b"}, "auto", "no prompt"),
        ({"prompt": "a", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "auto", "are the same"),
        ({"prompt": "a", "completion": "b", "label": 3}, "rated", "`label` must be true or false, this is 3"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "auto", "`history` must be a list"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_right(row: dict[str, Any], wanted: str, expected: str) -> None:
    assert expected in bad(row, wanted)


@pytest.mark.parametrize(
    ("arguments", "meaning"),
    [
        ({"on": True}, {"on": True}),
        ('{"on": true}', {"on": True}),
        ("", {}),
        (None, {}),
        ("null", {}),
        ("{on}", "is not JSON"),
        ("[1]", "must be an object"),
        ({"a": "\ud83d"}, "half a character"),
        ('{"\\ud83d": 1}', "half a character"),
        ({"a": float("nan")}, "what JSON cannot say"),
        ({"a": b"x"}, "what JSON cannot say"),
    ],
)
def test_arguments_of_calls_have_one_meaning(arguments: Any, meaning: Any) -> None:
    function = {"name": "lamp", "arguments": arguments}
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": function}]}
    if isinstance(meaning, str):
        with pytest.raises(BadRowError, match=meaning):
            read_turns([turn])
        return
    (message,) = read_turns([turn])
    assert message.tool_calls == ({"name": "lamp", "arguments": meaning},)
    assert message.ids == ("c1",)
