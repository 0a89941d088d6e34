"""Rows become tokens: reading, recognising, masks, splitting, packing, order."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_tokenizer
from veneer.config import Data, UserError
from veneer.data import Batch, Batches, Example, Renderer, prepare
from veneer.data.batch import UNTRAINED, pack
from veneer.data.recognise import Conversation, Message

CHAT = [
    ("user", "what does the cat say"),
    ("assistant", "the cat"),
    ("user", "please"),
    ("assistant", "the owl"),
]


def conversation(turns: list[tuple[str, str]]) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in turns), "rows.jsonl:1")


def jsonl(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def prepared(path: str, **settings: Any) -> Any:
    renderer = Renderer(tiny_tokenizer(), settings.pop("chat_template", "auto"), settings.pop("system_prompt", None))
    return prepare(Data.model_validate({"train": path, "validation": 0} | settings), renderer, seed=0)


def refused(path: str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        prepared(path, **settings)
    return str(caught.value)


def trained_text(example: Example) -> str:
    return str(tiny_tokenizer().decode([target for target in example.targets if target != UNTRAINED]))


def test_the_mask_trains_every_answer_with_its_end_token_and_nothing_else() -> None:
    example = Renderer(tiny_tokenizer()).example(conversation(CHAT))
    assert trained_text(example) == "the cat<|im_end|>the owl<|im_end|>"
    # A target stands one place before its token.
    for at, target in enumerate(example.targets):
        assert target in (UNTRAINED, (*example.ids, None)[at + 1])


def test_training_renders_what_the_template_renders() -> None:
    tokenizer = tiny_tokenizer()
    turns = [{"role": role, "content": text} for role, text in CHAT]
    whole = tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
    assert list(Renderer(tokenizer).example(conversation(CHAT)).ids) == whole


def test_generation_sees_the_tokens_that_training_puts_before_the_answer() -> None:
    renderer = Renderer(tiny_tokenizer(), system_prompt="be brief")
    example = renderer.example(conversation(CHAT[:2]))
    prompt = renderer.prompt_ids([Message("user", CHAT[0][1])])
    assert example.ids[: len(prompt)] == tuple(prompt)
    assert example.targets[len(prompt) - 1] != UNTRAINED
    assert "be brief" in tiny_tokenizer().decode(prompt)


def test_an_answer_that_would_merge_with_the_prompt_does_not_change_the_prompts_tokens() -> None:
    """`the ca` + `t`: the whole text has the token ` cat`, the prompt alone has not."""
    renderer = Renderer(tiny_tokenizer(chat=False))
    row = renderer.example(conversation([("user", "the ca"), ("assistant", "t says")]))
    prompt = renderer.prompt_ids([Message("user", "the ca")])
    assert tiny_tokenizer()("the cat says")["input_ids"][: len(prompt)] != prompt
    assert list(row.ids[: len(prompt)]) == prompt
    assert trained_text(row) == "t says<|im_end|>"


def test_the_end_of_turn_token_stops_generation_before_any_row_was_seen(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(tiny_tokenizer().chat_template.replace("<|im_end|>", "<|endoftext|>"))
    renderer = Renderer(tiny_tokenizer(), str(template))
    assert renderer.stop_ids == {tiny_tokenizer().eos_token_id, tiny_tokenizer().bos_token_id}


def test_without_a_template_a_row_is_prompt_completion_and_end() -> None:
    example = Renderer(tiny_tokenizer(chat=False)).example(conversation([("user", "the cat"), ("assistant", " says")]))
    assert tiny_tokenizer().decode(list(example.ids)) == "the cat says<|im_end|>"
    assert trained_text(example) == " says<|im_end|>"


@pytest.mark.parametrize("name", ["alpaca", "guanaco"])
def test_named_templates_train_the_answer_and_its_end(name: str) -> None:
    example = Renderer(tiny_tokenizer(chat=False), name).example(conversation([("system", "be brief"), *CHAT]))
    assert trained_text(example).split("<|im_end|>")[1].strip() == "the owl"
    assert trained_text(example).count("<|im_end|>") == 2


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "what does the cat say", "input": "", "output": "the cat"},
        {"prompt": "what does the cat say", "completion": "the cat"},
        {
            "messages": [
                {"role": "user", "content": "what does the cat say"},
                {"role": "assistant", "content": "the cat"},
            ]
        },
    ],
)
def test_each_format_gives_the_same_tokens(tmp_path: Path, row: dict[str, Any]) -> None:
    expected = Renderer(tiny_tokenizer()).example(conversation(CHAT[:2])).ids
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([row], indent=1))
    assert prepared(jsonl(tmp_path, [row])).train[0].ids == expected
    assert prepared(str(array)).train[0].ids == expected


def test_alpacas_input_follows_its_instruction(tmp_path: Path) -> None:
    row = {"instruction": "route this message", "input": "the dog", "output": "team"}
    assert "route this message\n\nthe dog" in tiny_tokenizer().decode(prepared(jsonl(tmp_path, [row])).train[0].ids)


def test_answers_within_a_prompt_are_read_and_not_trained(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in CHAT]
    (example,) = prepared(jsonl(tmp_path, [{"prompt": turns[:3], "completion": turns[3:]}])).train
    assert trained_text(example) == "the owl<|im_end|>"
    assert "the cat<|im_end|>" in tiny_tokenizer().decode(list(example.ids))
    assert "nothing to learn" in refused(jsonl(tmp_path, [{"prompt": turns[:2], "completion": turns[2:3]}]))


def test_named_templates_begin_as_the_tokenizer_does() -> None:
    class AddsBos:
        """A tokenizer that puts its begin token before text, as Llama-2's and OPT's do."""

        def __init__(self) -> None:
            self.plain = tiny_tokenizer(chat=False)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.plain, name)

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = self.plain(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    for template in ("alpaca", "guanaco", "none"):
        row = Renderer(AddsBos(), template).example(conversation(CHAT[:2]))
        assert row.ids.count(0) == 1
        assert row.ids[0] == 0
        assert row.targets[0] == UNTRAINED
        assert Renderer(AddsBos(), template).prompt_ids([Message("user", "the cat")])[0] == 0


def test_a_validation_file_is_accounted_for_and_its_overlap_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"the cat {n}", "completion": "the owl"} for n in range(3)]
    other = jsonl(tmp_path, [rows[0], {"prompt": "the hen", "completion": ""}], "held_out.jsonl")
    ledger = prepared(jsonl(tmp_path, rows), validation=other).ledger.as_dict()
    assert (ledger["rows"]["read"], ledger["rows"]["used"], ledger["rows"]["empty"]) == (5, 4, 1)
    assert any("1 held-out rows stand in the training data too" in warning for warning in ledger["warnings"])


def test_the_ledger_accounts_for_every_row_and_token(tmp_path: Path) -> None:
    good = {"prompt": "the cat", "completion": "the dog"}
    rows = [
        good,
        good,
        {"prompt": "the cat", "completion": " "},
        {"prompt": "x" * 500, "completion": "the dog"},
    ]
    rows += [{"prompt": f"the cat {n}", "completion": "the owl"} for n in range(6)]
    data = prepared(jsonl(tmp_path, rows), max_length=100, validation=3)
    ledger = data.ledger.as_dict()
    assert ledger["rows"] == {
        "read": 10,
        "used": 8,
        "unreadable": 0,
        "empty": 1,
        "duplicate": 1,
        "overlong": 1,
        "refused": 0,
        "training": 5,
        "validation": 3,
    }
    assert ledger["tokens"]["total"] == sum(len(example.ids) for example in data.train)
    assert ledger["tokens"]["trained"] == sum(example.trained for example in data.train)
    assert ledger["tokens"]["end_of_turn"] == 5
    assert len(ledger["warnings"]) == 3


def test_equal_rows_never_stand_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"the cat {n // 4}", "completion": "the owl"} for n in range(40)]
    data = prepared(jsonl(tmp_path, rows), validation=0.3)
    held_out = {row.example.ids for row in data.validation}
    assert held_out
    assert not held_out & {example.ids for example in data.train}
    assert len(data.train) + len(data.validation) == 40


def test_validation_may_be_a_file_and_limit_cuts_the_training_file_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"the cat {n}", "completion": "the owl"} for n in range(5)]
    other = jsonl(tmp_path, rows, "held_out.jsonl")
    data = prepared(jsonl(tmp_path, rows), validation=other, limit=2)
    assert (len(data.train), len(data.validation)) == (2, 5)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "holds no rows"),
        (['{"prompt": "a"'], "rows.jsonl:1: broken JSON"),
        (["3"], "rows.jsonl:1: a row must be a JSON object, this is a number"),
        ([{"question": "a", "answer": "b"}], "fit no known format"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "c"}],
            "rows.jsonl:2: missing `completion` (fields here: prompt)",
        ),
        ([{"prompt": "a", "completion": "b", "messages": []}], "fit 2 formats: messages, prompt-completion"),
        ([{"prompt": "a", "completion": 3}], "rows.jsonl:1: `completion` must be text, this is int"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "no turn of the role assistant"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], "turn 1 has the role 'robot'; known roles"),
        ([{"prompt": None, "completion": "b"}], "rows.jsonl:1: `prompt` must be text, this is null"),
        ([{"prompt": "\ud83d", "completion": "b"}], "rows.jsonl:1: `prompt` holds half a character"),
        (['{"a": ' + "[" * 100_000], "rows.jsonl:1: JSON that cannot be read"),
        ([{"messages": ["a"]}], "turn 1 needs `role` and `content`"),
        ([{"messages": "a"}], "`messages` must be a list of turns"),
        ([{"prompt": "a", "completion": " "}], "no row is left of 1 (1 with an empty answer"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(tmp_path: Path, rows: list[Any], expected: str) -> None:
    assert expected in refused(jsonl(tmp_path, rows))


def test_several_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    told = refused(jsonl(tmp_path, [{"prompt": "a", "completion": "b"}] + [{"prompt": "a"}] * 8))
    assert "8 bad rows" in told
    assert "rows.jsonl:2" in told
    assert "and 3 more" in told


def test_bad_files_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(str(tmp_path / "none.jsonl"))
    assert "is a folder" in refused(str(tmp_path))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe9"}\n')
    assert "line 2 is not UTF-8" in refused(str(tmp_path / "latin.jsonl"))
    (tmp_path / "broken.json").write_text('[\n{"prompt": "a"},\n{]')
    assert "broken.json:3: broken JSON" in refused(str(tmp_path / "broken.json"))


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\n')
    assert len(prepared(str(path)).train) == 1


def test_all_rows_held_out_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "completion": "the owl"} for n in range(4)]
    assert "leave none to train on" in refused(jsonl(tmp_path, rows), validation=4)


def test_templates_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"messages": [{"role": r, "content": t} for r, t in CHAT]}])

    def with_template(text: str) -> str:
        template = tmp_path / "t.jinja"
        template.write_text(text)
        return refused(path, chat_template=str(template))

    turns = (
        "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    assert "renders no end-of-turn token" in with_template(turns)
    rewriting = turns.replace(
        "m['role'] + m['content']", "m['role'] + m['content'] + eos_token + (messages | length | string)"
    )
    assert "renders earlier turns differently" in with_template(rewriting)
    assert "refuses the conversation: no" in with_template("{{ raise_exception('no') }}")
    assert "neither a known template nor a readable file" in refused(path, chat_template="chatxml")


def test_chat_data_without_a_template_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"messages": [{"role": r, "content": t} for r, t in CHAT]}])
    with pytest.raises(UserError, match="the base model has no chat template"):
        prepare(Data(train=path), Renderer(tiny_tokenizer(chat=False)), seed=0)


def example(length: int, first: int = 0) -> Example:
    ids = tuple(range(first, first + length))
    return Example(ids, (*ids[1:], UNTRAINED), "")


def test_a_batch_lays_documents_one_behind_the_other() -> None:
    batch = Batch.of([example(3), example(2, 10)])
    assert batch.ids_T.tolist() == [0, 1, 2, 10, 11]
    assert batch.targets_T.tolist() == [1, 2, UNTRAINED, 11, UNTRAINED]
    assert (batch.lengths, batch.trained, batch.tokens) == ((3, 2), 3, 5)


def test_every_row_stands_once_in_an_epoch_however_a_step_is_cut() -> None:
    examples = [example(2 + n % 7, n) for n in range(21)]

    def rows(batch_size: int, accumulation: int, step: int) -> list[int]:
        batches = Batches(examples, batch_size, accumulation, seed=3)
        firsts = [int(ids[0]) for batch in batches.step(step) for ids in torch.split(batch.ids_T, list(batch.lengths))]
        return sorted(firsts)

    assert Batches(examples, 8, 1, seed=3).steps_per_epoch == 3
    assert sorted(row for step in range(3) for row in rows(8, 1, step)) == list(range(21))
    for step in range(6):
        assert rows(8, 1, step) == rows(4, 2, step) == rows(1, 8, step)
    assert rows(8, 1, 0) != rows(8, 1, 3), "the second epoch has another order"


def test_packing_fills_packs_and_loses_nothing() -> None:
    lengths = [3, 9, 5, 2, 7, 4, 10, 1, 6, 8]
    packs = pack([example(length) for length in lengths], 10)
    assert sorted(len(e.ids) for p in packs for e in p) == sorted(lengths)
    assert all(sum(len(e.ids) for e in p) <= 10 for p in packs)
    assert len(packs) == 6  # 55 tokens
