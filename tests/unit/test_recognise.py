"""Every format that is known: what is recognised, what a row becomes, and what is refused."""

from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from veneer.config import UserError
from veneer.data.conversation import BadRowError, Conversation, Message
from veneer.data.formats import CONTENT, FORMATS, OF_TASKS, to_conversation
from veneer.data.recognise import recognise
from veneer.data.screening.prerendered import strip_control_tokens
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
    assert all(name in told for name in FORMATS if name not in ("chosen", *OF_TASKS))


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
        ({"messages": [USER, ASSISTANT | {"loss_weight": "much"}]}, "auto", "a number of at least 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, "auto", "'image_url'"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "search rice"}]}, "auto", "is not JSON"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{"id": 3}]}]}, "auto", "a tool call needs `name`"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": 7}]}, "auto", "`tool_calls` must be a list of calls"),
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


TOOL = {"type": "function", "function": {"name": "zq_tool", "parameters": {}}}
ROWS: dict[str, dict[str, Any]] = {
    "labelled": {"text": "a", "label": "b"},
    "tagged": {"tokens": ["a"], "tags": ["O"]},
    "text-pair": {"anchor": "a", "positive": "b"},
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "alpaca": {"instruction": "a", "output": "b"},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "question-answer": {"question": "a", "answer": "b"},
    "guanaco": {"text": "### Human: a### Assistant: b"},
    "text": {"text": "a"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "rated": {"prompt": "a", "completion": "b", "label": True},
    "chosen": {"prompt": "a", "chosen": "b", "rejected": "c"},
}
VALUES: dict[str, Any] = {"tools": [TOOL], "functions": [TOOL], "history": [["zq_tool", "z"]]}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("column", CONTENT)
def test_no_column_of_a_conversation_is_left_out_in_silence(name: str, column: str) -> None:
    """Each is in the conversation or refused by its name; an empty one is nothing, and one that is ignored is gone."""
    row = ROWS[name] | {column: VALUES.get(column, "zq_tool")}
    if column in FORMATS[name].reads:
        found = to_conversation(row, name, {})
        assert "zq_tool" in repr((found.messages, found.tools))
    else:
        with pytest.raises(BadRowError, match=rf"`{column}` would be left out: .*data\.ignore_columns=\[{column}\]"):
            to_conversation(row, name, {})
    for empty in (None, ""):
        assert to_conversation(ROWS[name] | {column: empty}, name, {}) == to_conversation(ROWS[name], name, {})


def test_a_context_stands_before_its_question() -> None:
    for row in (ROWS["question-answer"], ROWS["prompt-completion"], ROWS["alpaca"], ROWS["preference"]):
        assert read(row | {"context": "built in 1822"})[1].messages[0].content == "built in 1822\n\na"
    assert "`context` beside turns" in bad({"prompt": [USER], "completion": "b", "context": "c"})


def test_names_of_one_thing_must_agree() -> None:
    row = {"messages": [{"role": "system", "content": "be brief"}, USER, ASSISTANT]}
    assert len(read(row | {"system": "be brief"})[1].messages) == 3
    assert "begin with another system prompt" in bad(row | {"system": "be long"})
    assert "`system` and `system_prompt` differ" in bad(ROWS["alpaca"] | {"system": "a", "system_prompt": "b"})


def test_mapped_columns_leave_our_own_names_in_place() -> None:
    row = {"query": "a", "reply": "b", "system": "be brief", "tools": [TOOL], "context": "c", "text": "d"}
    _, found = read(row, {"prompt": "query", "completion": "reply"})
    assert [m.content for m in found.messages] == ["be brief", "c\n\na", "b"]
    assert found.tools == (TOOL,)
    assert read(row | {"label": False}, {"prompt": "query", "completion": "reply"})[0] == "rated"
    assert read({"prompt": "a", "completion": "b", "who": "x"}, {"system": "who"})[1].messages[0].content == "x"
    with pytest.raises(UserError, match="fit 2 formats: messages, prompt-completion"):
        read(row | {"messages": [USER, ASSISTANT]}, {"prompt": "query", "completion": "reply"})


@pytest.mark.parametrize("flag", ["train", "training", "trainable", "loss", "weight", "loss_weight"])
@pytest.mark.parametrize("off", [False, 0, 0.0, "false", "False", "no", "0"])
def test_flags_of_turns_decide_what_is_learnt(flag: str, off: Any) -> None:
    on = {"no": "yes", "false": "true"}.get(off, True)
    rows = {"messages": [USER | {flag: off}, ASSISTANT | {flag: off}, USER, ASSISTANT | {flag: on}]}
    assert [m.weight for m in read(rows)[1].messages if m.role == "assistant"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"mask": True}, "`mask` is not read"),
        ({"masked": 0}, "`masked` is not read"),
        ({"train_detail": [{"begin": 0}]}, "`train_detail` is not read"),
        ({"train": False, "weight": 1}, "contradiction: `weight` = 1, `train` = False"),
        ({"train": 0.5}, "`train` must be true or false"),
        ({"loss": "maybe"}, "`loss` must be true, false or a number"),
        ({"loss_weight": "nan"}, "a number of at least 0"),
        ({"images": ["a.png"]}, "`images` is not read: only text can be learnt"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(flags: dict[str, Any], expected: str) -> None:
    assert expected in bad({"messages": [USER, ASSISTANT | flags]})


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("rated", "labelled", "tagged")])
def test_answers_that_were_found_bad_are_not_learnt_as_good_ones(name: str) -> None:
    for label in (False, "False", "false", "no"):
        for field in ("label", "kto_tag"):
            assert "found bad" in bad(ROWS[name] | {field: label}, name)
    assert to_conversation(ROWS[name] | {"label": "True"}, name, {}).label is None
    assert to_conversation(ROWS[name] | {"label": 3}, name, {})
    if name == "text":  # the class of a document
        assert to_conversation(ROWS[name] | {"label": 0}, name, {})


def test_labels_as_text_rate_a_row() -> None:
    row = {"prompt": "a", "completion": "b"}
    for label, is_good in (("True", True), ("False", False), ("1", True), (0, False)):
        assert read(row | {"label": label})[0] == "rated"
        assert read(row | {"label": label})[1].label is is_good


def test_an_older_function_call_is_a_call() -> None:
    old = {"name": "search", "arguments": '{"for": ["rice"]}'}
    answer = read({"messages": [USER, ASSISTANT | {"function_call": old}]})[1].messages[1]
    assert (answer.content, answer.tool_calls) == (SAY.content, (CALL,))
    assert read({"messages": [USER, {"role": "assistant", "function_call": old}]})[1].messages[1].tool_calls == (CALL,)
    both = ASSISTANT | {"function_call": old, "tool_calls": [old]}
    assert "`tool_calls` and `function_call` both" in bad({"messages": [USER, both]})
    assert "on a turn of the user" in bad({"messages": [USER | {"function_call": old}, ASSISTANT]})


def test_parts_with_a_value_are_read() -> None:
    parts = [
        {"type": "reasoning", "value": "I think"},
        {"type": "text", "value": "so"},
        {"type": "tool_call", "value": '{"name": "search", "arguments": {"for": ["rice"]}}'},
    ]
    asked = {"role": "user", "content": [{"type": "text", "value": "a"}, {"type": "text", "text": "b"}]}
    user, answer = read({"messages": [asked, {"role": "assistant", "content": parts}]})[1].messages
    assert (user.content, answer.content, answer.reasoning, answer.tool_calls) == ("ab", "so", "I think", (CALL,))
    empty = {"role": "user", "content": [{"type": "text"}]}
    assert "must be text, this is null" in bad({"messages": [empty, ASSISTANT]})
    thought = {"role": "user", "content": [{"type": "reasoning", "value": "a"}]}
    assert "a part of the type 'reasoning'" in bad({"messages": [thought, ASSISTANT]})


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (date(2025, 5, 1), "2025-05-01"),
        (Decimal("9.50"), 9.5),
        (Decimal(7), 7),
        (b"abc", "abc"),
        (float("nan"), "holds nan"),
        ([float("inf")], "holds inf"),
        (b"\xff", "bytes that are no UTF-8"),
        ("great \ud83d", "half a character"),
        ({"a\ud83d": 1}, "half a character"),
        ({1: 2}, "which is no text"),
        ({1, 2}, "a set"),
    ],
)
def test_arguments_and_tools_are_json(value: Any, kept: Any) -> None:
    call = {"name": "book", "arguments": {"when": value}}
    tool = {"name": "book", "parameters": {"default": value}}
    rows = ({"messages": [USER, ASSISTANT | {"tool_calls": [call]}]}, ROWS["messages"] | {"tools": [tool]})
    if isinstance(kept, str) and " " in kept:
        assert all(kept in bad(row) for row in rows)
    else:
        assert read(rows[0])[1].messages[1].tool_calls[0]["arguments"] == {"when": kept}
        assert read(rows[1])[1].tools[0]["function"]["parameters"] == {"default": kept}


def test_nesting_without_end_is_refused() -> None:
    value: Any = 1
    for _ in range(500):
        value = [value]
    call = {"name": "book", "arguments": {"when": value}}
    assert "nested deeper than 100" in bad({"messages": [USER, ASSISTANT | {"tool_calls": [call]}]})


def test_turns_as_json_text_are_turns() -> None:
    text = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    name, found = read({"messages": text})
    assert (name, [m.content for m in found.messages]) == ("messages", ["a", "b"])
    assert [m.content for m in read({"prompt": text[:33] + "]", "completion": "b"})[1].messages] == ["a", "b"]
    assert "`messages` is not JSON" in bad({"messages": text.replace('"', "'")})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt;completion": "a;b"}, "separated by semicolons"),
        ({"prompt\tcompletion": "a"}, "separated by tabs"),
        ({"data": [{"prompt": "a", "completion": "b"}]}, "`data` holds the rows themselves (1)"),
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, "one object of columns"),
        ({"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}}, "one object of columns"),
    ],
)
def test_what_is_amiss_with_a_file_is_guessed(row: dict[str, Any], expected: str) -> None:
    assert expected in unknown(row)


def test_a_hundred_thousand_columns_are_not_all_told() -> None:
    row = {f"column {n}": "a" for n in range(100_000)}
    assert "and 99,988 more fit no known format" in unknown(row)
    assert len(unknown(row)) < 3000


def brought(text: str, setting: str = "auto", role: str = "assistant") -> str:
    turns = (Message(role, text),) if role == "document" else (ASK, Message("assistant", text))
    return strip_control_tokens(Conversation(turns), setting)[0].messages[-1].content


@pytest.mark.parametrize(
    "end", ["<|im_end|>", "</s>", "<|eot_id|>\n", "<end_of_turn>", "<｜end▁of▁sentence｜>", " [/INST] </s>"]
)
def test_rows_that_bring_their_template_are_refused(end: str) -> None:
    for role in ("assistant", "document"):
        with pytest.raises(BadRowError, match=r"ends with .*data\.special_tokens_in_text"):
            brought("wren" + end, role=role)
        with pytest.raises(BadRowError, match=r"begins with .*data\.special_tokens_in_text"):
            brought("<|im_start|>user\nwren", "strip", role)
        assert brought("wren" + end, "text", role) == "wren" + end
        assert brought(f"of {end.strip()} and the like", role=role) == f"of {end.strip()} and the like"
    assert brought("wren" + end, "strip") == "wren"
    with pytest.raises(BadRowError, match="ends with"):
        brought("wren" + end, "strip", "document")


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
        ({"a": float("nan")}, "holds nan"),
        ({"a": b"x"}, {"a": "x"}),
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
