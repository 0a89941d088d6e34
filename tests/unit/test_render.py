"""Rows become tokens: the mask, the templates, control tokens in text, what templates cannot say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.support.masks import STARTS, TRIMS, check_mask, hypothesis_settings, random_chats
from tests.support.rows import CHAT, conversation, renderer, text_of, trained_text, turns
from tests.support.tiny import family_tokenizer, metaspace_tokenizer, tiny_tokenizer
from veneer.config import UserError
from veneer.data.batch import UNTRAINED
from veneer.data.conversation import BadRowError, Conversation, Message
from veneer.data.render import Renderer
from veneer.data.template import END_OF_TURN, own_template
from veneer.data.turns import read_turns

TEMPLATES = Path(__file__).parent / "templates"
WITH_REASONING = (
    Message("user", "a"),
    Message("assistant", "the cat", reasoning="I think"),
    Message("user", "b"),
    Message("assistant", "the owl", reasoning="I think again"),
)


def fixture(name: str) -> str:
    return str(TEMPLATES / f"{name}.jinja")


def refused(messages: Any, **settings: Any) -> str:
    (made,) = renderer(family_tokenizer(), **settings).render([Conversation(tuple(messages), "p")])
    assert isinstance(made, BadRowError)
    return str(made)


def test_the_mask_trains_every_answer_with_its_end_token_and_nothing_else() -> None:
    example = renderer().example(conversation(CHAT))
    assert trained_text(example) == "the cat<|im_end|>the owl<|im_end|>"
    # A target stands one place before its token.
    for at, target in enumerate(example.targets):
        assert target in (UNTRAINED, [*example.ids, None][at + 1])


def test_training_renders_what_the_template_renders() -> None:
    tokenizer = tiny_tokenizer()
    whole = tokenizer.apply_chat_template(turns(CHAT), tokenize=True)["input_ids"]
    assert renderer().example(conversation(CHAT)).ids.tolist() == whole


def test_generation_sees_the_tokens_that_training_puts_before_each_answer() -> None:
    made = renderer(system_prompt="be brief")
    example = made.example(conversation(CHAT))
    for answers in (1, 3):
        prompt = made.prompt_ids(conversation(CHAT).messages[:answers])
        assert example.ids[: len(prompt)].tolist() == prompt
        assert example.targets[len(prompt) - 1] != UNTRAINED
    assert "be brief" in tiny_tokenizer().decode(prompt)


def test_an_answer_that_would_merge_with_the_prompt_does_not_change_the_prompts_tokens() -> None:
    """`the ca` + `t`: the whole text has the token ` cat`, the prompt alone has not."""
    plain = tiny_tokenizer(chat=False)
    made = renderer(plain)
    row = made.example(conversation([("user", "the ca"), ("assistant", "t says")]))
    prompt = made.prompt_ids([Message("user", "the ca")])
    assert plain("the cat says")["input_ids"][: len(prompt)] != prompt
    assert row.ids[: len(prompt)].tolist() == prompt
    assert trained_text(row) == "t says<|im_end|>"


def test_a_space_before_the_answer_is_no_part_of_it() -> None:
    """`says ` + `cat`: the whole text has ` cat`, whose offsets some tokenizers give without the space."""
    made = renderer(tiny_tokenizer(chat=False))
    row = made.example(conversation([("user", "the owl says "), ("assistant", "cat")]))
    prompt = made.prompt_ids([Message("user", "the owl says ")])
    assert row.ids[: len(prompt)].tolist() == prompt
    assert trained_text(row) == "cat<|im_end|>"


def test_the_end_of_turn_token_stops_generation_before_any_row_was_seen(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(tiny_tokenizer().chat_template.replace("<|im_end|>", "<|endoftext|>"))
    assert renderer(chat_template=str(template)).stop_ids == {0, 2}


def test_without_a_template_a_row_is_prompt_completion_and_end() -> None:
    example = renderer(tiny_tokenizer(chat=False)).example(conversation([("user", "the cat"), ("assistant", " says")]))
    assert text_of(example) == "the cat says<|im_end|>"
    assert trained_text(example) == " says<|im_end|>"


def test_a_document_is_learnt_as_a_whole() -> None:
    for chat in (True, False):
        example = renderer(tiny_tokenizer(chat)).example(conversation([("document", "the cat says")]))
        assert text_of(example) == "the cat says<|im_end|>"
        assert example.trained == len(example.ids) - 1


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", "the cat<|im_end|>the owl<|im_end|>the hen<|im_end|>"),
        ("last", "the hen<|im_end|>"),
        ("completion", "the owl<|im_end|>the hen<|im_end|>"),
        ("all", None),
    ],
)
def test_loss_on_says_what_is_learnt(loss_on: str, expected: str | None) -> None:
    chat = [*CHAT, ("tool", "please"), ("assistant", "the hen")]
    example = renderer(loss_on=loss_on).example(conversation(chat))
    if expected is None:
        assert example.trained == len(example.ids) - 1
    else:
        assert trained_text(example) == expected


def test_weights_of_answers_are_those_of_their_tokens() -> None:
    messages = conversation(CHAT).messages
    messages = (messages[0], replace(messages[1], weight=0.25), *messages[2:])
    example = renderer().example(Conversation(messages))
    assert sorted(set(example.weights.tolist())) == [0, 0.25, 1]
    assert np.count_nonzero(example.weights == 0.25) == np.count_nonzero(example.weights == 1)
    example = renderer().example(Conversation((messages[0], replace(messages[1], weight=0.0), *messages[2:])))
    assert trained_text(example) == "the owl<|im_end|>"


class AddsBos:
    """A tokenizer that puts its begin token before text, as Llama's and Gemma's do."""

    def __init__(self) -> None:
        self.plain = family_tokenizer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = self.plain(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}


@pytest.mark.parametrize("template", [*END_OF_TURN, "none", "auto", "llama-3.1", "mistral-v3", "gemma-2"])
def test_a_row_has_exactly_one_begin_token(template: str) -> None:
    name = fixture(template) if "." in template or template in ("mistral-v3", "gemma-2") else template
    made = renderer(AddsBos(), chat_template=name)
    for row in (made.example(conversation(CHAT[:2])), made.example(conversation([("document", "x")]))):
        assert (row.ids.tolist().count(0), row.ids[0], row.weights[0]) == (1, 0, 0)
    prompt = made.prompt_ids([Message("user", "the cat")])
    assert (prompt[0], prompt.count(0)) == (0, 1)


def test_the_template_that_ships_renders_the_begin_token() -> None:
    made = renderer(AddsBos(), chat_template="chatml")
    shipped = tiny_tokenizer().apply_chat_template(turns(CHAT), chat_template=made.template, tokenize=True)["input_ids"]
    assert shipped == made.example(conversation(CHAT)).ids.tolist()


def test_a_template_that_doubles_the_begin_token_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ bos_token }}{{ bos_token }}" + tiny_tokenizer().chat_template)
    (made,) = renderer(AddsBos(), chat_template=str(template)).render([conversation(CHAT)])
    assert "two begin tokens" in str(made)


# Control strings within text


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a<|im_start|>assistant\nb", "<|im_end|><|im_end|>", "<<|im_end|>|im_end|>"]
)
def test_control_strings_in_text_stay_text(text: str) -> None:
    made = renderer()
    row = Conversation((Message("system", text), Message("user", text), Message("assistant", text)))
    example = made.example(row)
    assert trained_text(example) == text + "<|im_end|>"
    controls = [token for token in example.ids.tolist() if token in (0, 1, 2)]
    assert controls == [1, 2, 1, 2, 1, 2]
    prompt = made.prompt_ids(row.messages[:2])
    assert example.ids[: len(prompt)].tolist() == prompt


def test_control_strings_may_be_meant() -> None:
    made = renderer(special_tokens_in_text="control")
    example = made.example(conversation([("user", "a<|im_end|>b"), ("assistant", "c")]))
    assert example.ids.tolist().count(2) == 3


def test_control_strings_in_tools_and_calls_stay_text() -> None:
    call = {"name": "search", "arguments": {"for": ["<|im_end|>"]}}
    tool = {"type": "function", "function": {"name": "search", "description": "<|im_start|>"}}
    row = Conversation((Message("user", "a"), Message("assistant", "", tool_calls=(call,))), tools=(tool,))
    example = renderer().example(row)
    assert [token for token in example.ids.tolist() if token in (0, 1, 2)] == [1, 2, 1, 2, 1, 2]
    assert '["<|im_end|>"]' in trained_text(example)


@pytest.mark.parametrize("name", END_OF_TURN)
def test_masks_hold_for_tokenizers_that_begin_texts_with_a_space(name: str) -> None:
    tokenizer = metaspace_tokenizer()
    made = renderer(tokenizer, chat_template=name)
    chat = [("system", "be brief"), ("user", "the </s> cat"), ("assistant", "the owl </s> says"), ("user", "please")]
    example = made.example(conversation([*chat, ("assistant", "route this")]))
    said = trained_text(example, tokenizer).split("</s>")
    assert [text.strip() for text in said] == ["the owl", "says", "route this", ""]
    assert [token for token in example.ids[example.weights > 0] if token in tokenizer.all_special_ids] == [2, 2]
    prompt = made.prompt_ids(conversation(chat).messages)
    assert example.ids[: len(prompt)].tolist() == prompt


# What templates cannot say


def test_tools_are_spelled_out_where_a_template_leaves_them_out() -> None:
    call = {"name": "search", "arguments": {"for": "rice"}}
    tool = {"type": "function", "function": {"name": "search", "parameters": {}}}
    messages = (
        Message("system", "be brief"),
        Message("user", "a"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "2"),
        Message("assistant", "two"),
    )
    row = Conversation(messages, tools=(tool,))
    for template, spelled in (("auto", True), (fixture("qwen-2.5"), False)):
        example = renderer(chat_template=template).example(row)
        assert (
            trained_text(example)
            .replace("\n", "")
            .endswith('<tool_call>{"name": "search", "arguments": {"for": "rice"}}</tool_call><|im_end|>two<|im_end|>')
        )
        text = text_of(example)
        assert text.index("be brief") < text.index('"name": "search", "parameters"') < text.index("<tool_response>")
        assert ("You may call one or more of these functions to answer" in text) is spelled


def test_reasoning_is_never_lost_in_silence() -> None:
    answer = (Message("user", "a"), Message("assistant", "b", reasoning="I think"))
    assert trained_text(renderer().example(Conversation(answer))) == "<think>\nI think\n</think>\n\nb<|im_end|>"
    assert "I think" in trained_text(renderer(chat_template=fixture("qwen-3")).example(Conversation(answer)))
    assert "leaves the reasoning of answers out" in refused(answer, chat_template=fixture("deepseek-r1-distill"))


# Templates that render earlier turns anew


def test_rewritten_history_is_refused_with_the_first_differing_token() -> None:
    told = refused(WITH_REASONING, chat_template=fixture("qwen-3"))
    assert "renders earlier turns differently once an answer follows" in told
    assert "before the answer of turn 4 is '<' at first and 't' then" in told or "'<' at first" in told
    assert "data.rewritten_history to split or last" in told


def test_rewritten_history_may_be_split_or_left_to_the_last_answer() -> None:
    row = Conversation(WITH_REASONING, "p")
    (last,) = renderer(chat_template=fixture("qwen-3"), rewritten_history="last").render([row])
    assert not isinstance(last, BadRowError)
    assert len(last) == 1
    assert "I think again" in trained_text(last[0])
    assert "the cat" not in trained_text(last[0])
    made = renderer(chat_template=fixture("qwen-3"), rewritten_history="split")
    (split,) = made.render([row])
    assert not isinstance(split, BadRowError)
    assert ["I think\n" in trained_text(e) for e in split] == [True, False]
    # Each answer stands behind what the model is asked with when it generates.
    for example, count in zip(split, (1, 3)):
        prompt = made.prompt_ids(WITH_REASONING[:count])
        assert example.ids[: len(prompt)].tolist() == prompt
        assert example.targets[len(prompt) - 1] != UNTRAINED


def test_a_template_that_closes_the_whole_text_with_one_more_token_rewrites_nothing() -> None:
    example = renderer(family_tokenizer(), chat_template=fixture("phi-3")).example(conversation(CHAT))
    assert trained_text(example, family_tokenizer()) == "the cat<|end|>the owl<|end|>\n<|im_end|>"


def test_a_conversation_may_begin_with_an_answer() -> None:
    """SmolLM2's template puts a system turn before the first turn, but nothing before none."""
    example = renderer(chat_template=fixture("smollm2")).example(conversation([("assistant", "the cat"), *CHAT[2:]]))
    assert trained_text(example) == "the cat<|im_end|>the owl<|im_end|>"


@pytest.mark.parametrize("name", ["llama-3.1", "qwen-2.5", "zephyr", "smollm2", "gemma-2"])
def test_templates_of_real_models_train_answers_and_their_end(name: str) -> None:
    made = renderer(family_tokenizer(), chat_template=fixture(name))
    example = made.example(conversation(CHAT))
    first, second = trained_text(example, family_tokenizer()).split("the owl")
    assert first.startswith("the cat<")
    assert second == first.removeprefix("the cat")
    for answers in (1, 3):
        prompt = made.prompt_ids(conversation(CHAT).messages[:answers])
        assert example.ids[: len(prompt)].tolist() == prompt


def test_a_system_prompt_that_moves_is_told(tmp_path: Path) -> None:
    told = refused(conversation([("system", "be brief"), *CHAT]).messages, chat_template=fixture("mistral-v3"))
    assert "data.chat_template to a template that renders both alike" in told
    assert renderer(chat_template="mistral").example(conversation([("system", "be brief"), *CHAT]))


def test_templates_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    def with_template(text: str) -> str:
        template = tmp_path / "t.jinja"
        template.write_text(text)
        return refused(conversation(CHAT).messages, chat_template=str(template))

    said = (
        "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    assert "renders no end-of-turn token" in with_template(said)
    last = "('!' if loop.last and m['role'] == 'assistant' else '')"
    rewriting = said.replace("m['content']", f"m['content'] + eos_token + {last}")
    assert "renders earlier turns differently" in with_template(rewriting)
    assert "refuses the conversation: no" in with_template("{{ raise_exception('no') }}")
    assert "the generation prompt is not what stands before the answer" in with_template(
        said.replace("%}assistant{%", "%}model{%")
    )
    with pytest.raises(UserError, match="neither a known template nor a readable file"):
        renderer(chat_template="chatxml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\xff", "as text"), (b"a" * (2**20 + 1), "at most 1,048,576 are read"), (None, "a folder")],
)
def test_a_template_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "mine.jinja"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=rf"data\.chat_template = .*mine\.jinja: neither .*{expected}"):
        renderer(chat_template=str(path))
    with pytest.raises(UserError, match="a device"):
        renderer(chat_template="/dev/zero")


@pytest.mark.parametrize("name", [*END_OF_TURN, "auto"])
def test_the_mask_is_exactly_the_answers_and_their_end(name: str) -> None:
    tokenizer = AddsBos()
    made = renderer(tokenizer, chat_template=name)

    @hypothesis_settings(60)
    @given(random_chats())
    def check(chat: list[tuple[str, str]]) -> None:
        check_mask(made, tokenizer, chat, END_OF_TURN.get(name) or "<|im_end|>", name in TRIMS, STARTS.get(name, ""))

    check()


def test_many_rows_at_once_are_the_rows_one_by_one() -> None:
    made = renderer()
    rows = [conversation(CHAT[:2]), conversation(CHAT), conversation([("user", "<|im_end|>"), ("assistant", "b")])]
    together: Callable[[int], Any] = made.render(rows).__getitem__
    for n, row in enumerate(rows):
        assert together(n)[0].ids.tolist() == made.example(row).ids.tolist()


# Templates with tools of their own

CALL = {"name": "lamp", "arguments": {"on": True, "room": "hall"}}
LAMP = {"type": "function", "function": {"name": "lamp", "description": "", "parameters": {}}}
# Writes a call in the place of the text, as Llama 3.1's; wants an id of nine letters and digits, as Mistral's; joins
# the arguments as text, as DeepSeek's.
REPLACES = "{{ c.function.name }} {{ c.function.arguments | tojson }}"
WANTS_IDS = "{% if not c.id or c.id | length != 9 %}{{ raise_exception('no id') }}{% endif %}{{ c.id }} " + REPLACES
WANTS_TEXT = "{{ c.function.name + ' ' + c.function.arguments }}"


def native(tmp_path: Path, call: str) -> Any:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<|im_start|>{{ m.role }} "
        "{% if m.tool_calls %}{% for c in m.tool_calls %}CALL " + call + "{% endfor %}{% elif m.role == 'tool' %}"
        "{{ m.tool_call_id }} {{ m.content }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    return renderer(chat_template=str(template))


def called(content: str = "", ids: tuple[str, ...] = ()) -> Conversation:
    messages = (
        Message("user", "a"),
        Message("assistant", content, tool_calls=(CALL,), ids=ids),
        Message("tool", "ok", ids=ids),
        Message("assistant", "done"),
    )
    return Conversation(messages, "p", tools=(LAMP,))


@pytest.mark.parametrize(
    ("call", "ids", "learnt"),
    [
        (REPLACES, (), 'CALL lamp {"on": true, "room": "hall"}'),
        (WANTS_TEXT, (), 'CALL lamp {"on": true, "room": "hall"}'),
        (WANTS_IDS, ("abcdefgh1",), 'CALL abcdefgh1 lamp {"on": true, "room": "hall"}'),
        (WANTS_IDS, (), 'CALL call00000 lamp {"on": true, "room": "hall"}'),
    ],
)
def test_a_templates_own_form_of_calls_is_used(tmp_path: Path, call: str, ids: tuple[str, ...], learnt: str) -> None:
    made = native(tmp_path, call)
    example = made.example(called(ids=ids))
    assert trained_text(example) == f"{learnt}<|im_end|>done<|im_end|>"
    assert "You may call one or more" not in text_of(example)
    assert made.notes["tools_spelled"] == 0
    if call == WANTS_IDS:  # the result names the call that it answers
        assert f"tool {learnt.split()[1]} ok" in text_of(example)
        long = made.example(called(ids=("call_0123456789",)))
        assert len(trained_text(long).split()[1]) == 9


def test_text_that_a_template_drops_beside_a_call_is_told(tmp_path: Path) -> None:
    (made,) = native(tmp_path, REPLACES).render([called("I switch it on.")])
    assert "the chat template leaves out the answer" in str(made)


def test_veneers_own_form_of_calls_is_counted() -> None:
    made = renderer()
    assert "<tool_call>" in text_of(made.example(called()))
    assert made.notes["tools_spelled"] == 1


def test_a_tool_turn_that_brings_its_tool_response_is_not_wrapped_again() -> None:
    result = "<tool_response>\n1\n</tool_response>"
    given = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "<tool_call>\n{}\n</tool_call>"},
        {"from": "tool", "value": f"{result}\n{result}"},
        {"from": "gpt", "value": "two"},
    ]
    row = Conversation(read_turns(given), "p")
    for template in ("auto", fixture("qwen-2.5")):
        assert text_of(renderer(chat_template=template).example(row)).count(f"user\n{result}\n{result}<|im_end|>") == 1


def test_answers_that_the_generation_prompt_does_not_ask_for_are_told_with_what_helps(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    plain = tiny_tokenizer().chat_template
    template.write_text(plain.replace("assistant\n", "assistant\n<think>\n"))
    told = refused(conversation(CHAT).messages, chat_template=str(template))
    assert "it has '<think>\\n'" in told
    assert "rewritten_history" not in told
    template.write_text(plain)  # what the message says: the generation prompt changed
    assert renderer(chat_template=str(template)).example(conversation(CHAT))


def test_an_end_token_that_is_not_special_is_named(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|over|>", special=False, normalized=False)])
    template = tmp_path / "t.jinja"
    template.write_text(tokenizer.chat_template.replace("<|im_end|>", "<|over|>"))
    (made,) = renderer(tokenizer, chat_template=str(template)).render([conversation(CHAT)])
    assert "ends an answer in <|over|>, which is not marked as a special token" in str(made)


def test_of_several_templates_the_default_is_the_tokenizers_own() -> None:
    tokenizer = tiny_tokenizer()
    plain = str(tokenizer.chat_template)
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ 1 }}"}
    assert own_template(tokenizer) == plain == Renderer(tokenizer).template
    tokenizer.chat_template = {"tool_use": "{{ 1 }}"}
    assert own_template(tokenizer) is None
    assert Renderer(tokenizer).template is None
