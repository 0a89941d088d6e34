"""Files become training and held-out examples, as the settings say."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.notices import notified
from tests.support.rows import (
    CHAT,
    GOOD,
    WORDS,
    distinct,
    jsonl,
    prepared,
    refused,
    renderer,
    text_of,
    trained_text,
    turns,
)
from tests.support.tiny import tiny_tokenizer
from veneer.config import Data, UserError
from veneer.data.batch import Example
from veneer.data.pipeline import prepare, read_held_out
from veneer.data.render import Renderer
from veneer.data.tokens.corpus import Corpus, is_sound

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_answers_within_a_prompt_are_read_and_not_trained(tmp_path: Path) -> None:
    (example,) = prepared(jsonl(tmp_path, [{"prompt": turns(CHAT[:3]), "completion": turns(CHAT[3:])}])).train
    assert trained_text(example) == "the owl<|im_end|>"
    assert "the cat<|im_end|>" in text_of(example)


# Files


def test_several_files_may_have_formats_of_their_own(tmp_path: Path) -> None:
    first = jsonl(tmp_path, distinct(2), "a.jsonl")
    second = jsonl(tmp_path, [{"messages": turns(CHAT)}], "b.jsonl")
    data = prepared([first, second])
    assert [example.place for example in data.train] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert data.ledger.as_dict()["format"] == "messages, prompt-completion"
    assert len(prepared(str(tmp_path / "*.jsonl")).train) == 3


def test_mixed_formats_in_one_file_are_bad_rows(tmp_path: Path) -> None:
    told = refused(jsonl(tmp_path, [GOOD, {"messages": turns(CHAT)}]))
    assert "rows.jsonl:2: missing `prompt`; prompt-completion needs" in told
    assert "data.bad_rows=drop" in told


def test_several_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    told = refused(jsonl(tmp_path, [GOOD] + [{"prompt": "a"}] * 8))
    assert "8 bad rows" in told
    assert "rows.jsonl:2" in told
    assert "and 3 more" in told


def test_many_empty_rows_do_not_hide_a_bad_one(tmp_path: Path) -> None:
    rows = [GOOD, *(GOOD | {"prompt": str(n), "completion": ""} for n in range(30)), {"prompt": "a"}]
    assert "rows.jsonl:32: missing `completion`" in refused(jsonl(tmp_path, rows))


def test_a_conversation_that_ends_with_the_user_is_learnt_up_to_the_last_answer(tmp_path: Path) -> None:
    data = prepared(jsonl(tmp_path, [{"messages": turns([*CHAT, ("user", "and the hen")])}]))
    assert text_of(data.train[0]).endswith("the owl<|im_end|>\n")
    assert any("1 row with more after the last answer" in warning for warning in data.ledger.warnings)


def test_no_row_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    assert "no row is left of 1 (1 empty" in refused(jsonl(tmp_path, [GOOD | {"completion": " "}]))
    assert "holds no rows" in refused(jsonl(tmp_path, []))


def test_limit_and_sample_choose_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path, distinct(50))
    places = [example.place for example in prepared(path, sample=5).train]
    assert len(places) == 5
    assert places == [example.place for example in prepared(path, sample=5).train]
    assert places != [f"rows.jsonl:{n}" for n in range(1, 6)]
    assert [example.place for example in prepared(path, limit=2).train] == ["rows.jsonl:1", "rows.jsonl:2"]
    data = Data(train=path, sample=5, validation=0)
    other = prepare(data, Renderer(tiny_tokenizer(), data), seed=1)
    assert [example.place for example in other.train] != places


def test_text_files_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the cat says\nthe owl\n\nthe dog\n")
    assert text_of(prepared(str(path)).train[0]) == "the cat says<|im_end|>"
    assert len(prepared(str(path)).train) == 3
    assert len(prepared(str(path), text_by="paragraph").train) == 2
    assert len(prepared(str(path), text_by="file").train) == 1


# Length


def test_overlong_rows_are_dropped_truncated_or_refused(tmp_path: Path) -> None:
    long = GOOD | {"completion": "the dog " * 60}
    path = jsonl(tmp_path, [*distinct(3), long])
    assert len(prepared(path, max_length=100).train) == 3
    (cut,) = [e for e in prepared(path, max_length=100, overlong="truncate").train if e.place == "rows.jsonl:4"]
    assert len(cut.ids) == 100
    assert cut.weights[-1] == 1
    told = refused(path, max_length=100, overlong="refuse")
    assert "1 overlong row" in told
    assert "rows.jsonl:4: 1" in told


def test_rows_whose_answers_would_all_be_cut_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [*distinct(3), GOOD | {"prompt": "the dog " * 60}])
    told = refused(path, max_length=100, overlong="truncate")
    assert "1 of 4 rows (25.0%) have no trained token within data.max_length = 100; at most 0.1% may" in told
    ledger = prepared(path, max_length=100, overlong="truncate", max_cut_rows=0.3).ledger
    assert (ledger.rows["overlong"], ledger.notes["all_cut"]) == (1, 1)


def test_a_huge_row_is_counted_without_being_tokenized(tmp_path: Path) -> None:
    data = prepared(jsonl(tmp_path, [GOOD, GOOD | {"prompt": "x" * 5_000_000}]))
    assert (data.ledger.rows["overlong"], len(data.train)) == (1, 1)
    assert data.ledger.as_dict()["lengths"]["percentiles"]["max"] > 2048


# Duplicates and splits


def test_equal_rows_are_left_out_or_kept(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [GOOD, *distinct(3), GOOD])
    assert [e.place for e in prepared(path).train] == [f"rows.jsonl:{n}" for n in range(1, 5)]
    assert len(prepared(path, duplicates="keep").train) == 5


def test_like_rows_never_stand_on_both_sides(tmp_path: Path) -> None:
    base = "route this message to the right team and please say what the cat and the owl and the hen said about it"
    rows = [{"prompt": f"{n // 4} {base} {n // 4} {base[::-1]}" + "!" * (n % 4), "completion": "x"} for n in range(40)]
    data = prepared(jsonl(tmp_path, rows), validation=8, duplicates="keep", max_length=500)
    sides = [{int(e.place.split(":")[1]) - 1 for e in part} for part in (data.train, data.validation)]
    assert (len(sides[0]), len(sides[1])) == (32, 8)
    assert not {n // 4 for n in sides[0]} & {n // 4 for n in sides[1]}


def test_rows_of_a_group_stand_on_one_side(tmp_path: Path) -> None:
    rows = [row | {"customer": n % 5} for n, row in enumerate(distinct(40))]
    data = prepared(jsonl(tmp_path, rows), validation=0.25, group="customer")
    sides = [{(int(e.place.split(":")[1]) - 1) % 5 for e in part} for part in (data.train, data.validation)]
    assert sides[1]
    assert not sides[0] & sides[1]
    assert "no column `client`" in refused(jsonl(tmp_path, rows), group="client")


def test_a_split_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, distinct(4))
    assert "leave none to train on" in refused(path, validation=4)
    rows = [row | {"customer": n % 2} for n, row in enumerate(distinct(40))]
    assert "form 2 groups" in refused(jsonl(tmp_path, rows, "b.jsonl"), validation=3, group="customer")
    one = refused(jsonl(tmp_path, [row | {"customer": 1} for row in rows], "c.jsonl"), validation=3, group="customer")
    assert "are all alike" in one
    assert "set data.validation to 0" in one


def test_training_rows_that_stand_in_a_held_out_file_are_left_out(tmp_path: Path) -> None:
    rows = distinct(4)
    other = jsonl(
        tmp_path, [rows[0], rows[1] | {"completion": rows[1]["completion"] + "!"}, *distinct(2, 50)], "held.jsonl"
    )
    data = prepared(jsonl(tmp_path, rows), validation=other)
    ledger = data.ledger.as_dict()
    assert [example.place for example in data.train] == ["rows.jsonl:3", "rows.jsonl:4"]
    assert (ledger["rows"]["read"], ledger["rows"]["training"], ledger["rows"]["validation"]) == (8, 2, 4)
    assert ledger["rows"]["duplicate"] == 2
    assert any(
        "2 rows to train on that the held-out files have too: left out" in warning for warning in ledger["warnings"]
    )
    kept = prepared(jsonl(tmp_path, rows), validation=other, duplicates="keep")
    assert len(kept.train) == 4
    assert kept.ledger.overlap["rows"] == 2


def test_shared_passages_with_a_held_out_file_are_told_or_refused(tmp_path: Path) -> None:
    passage = "one two three four five six seven eight nine ten eleven twelve thirteen"
    train = jsonl(tmp_path, [*distinct(3), {"prompt": f"before {passage}", "completion": "the first answer of all"}])
    held = jsonl(
        tmp_path, [{"prompt": f"quite another {passage} it is", "completion": "no"}, *distinct(2, 60)], "h.jsonl"
    )
    ledger = prepared(train, validation=held).ledger.as_dict()
    assert ledger["overlap"] == {"rows": 1, "of": 3, "places": ["h.jsonl:1"]}
    assert any("1 of 3 held-out rows share 13 words in a row" in warning for warning in ledger["warnings"])
    assert "h.jsonl:1" in refused(train, validation=held, overlap="refuse")


def test_held_out_rows_come_with_their_turns(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        [{"messages": turns(CHAT)}, *({"messages": turns([*CHAT[:3], ("assistant", str(n))])} for n in range(9))],
    )
    data = prepared(path, validation=4, duplicates="keep")
    rows = data.held_out()
    assert [row.example.place for row in rows] == [row.conversation.place for row in rows]
    assert [row.example.ids.tolist() for row in rows] == [example.ids.tolist() for example in data.validation]
    assert len(data.held_out(2)) == 2
    assert len(read_held_out(path, "--data", Data(train=path), renderer(), 3)) == 3


def test_held_out_rows_of_several_files_come_in_order(tmp_path: Path) -> None:
    files = [jsonl(tmp_path, distinct(30, 100 * n), f"{n}.jsonl") for n in range(3)]
    data = prepared(files, validation=40)
    rows = data.held_out()
    assert [row.conversation.place for row in rows] == [example.place for example in data.validation]
    assert len({row.conversation.place.split(":")[0] for row in rows}) == 3


def test_a_row_that_teaches_nothing_is_empty(tmp_path: Path) -> None:
    """Split by answers, of which the last alone would count and has no weight."""
    template = Path(__file__).parent / "templates" / "qwen-3.jinja"
    row = {"messages": [*turns(CHAT[:3]), {"role": "assistant", "content": "the owl", "loss_weight": 0}]}
    path = jsonl(tmp_path, [row, {"messages": turns(CHAT)}])
    data = prepared(path, rewritten_history="split", loss_on="last", chat_template=str(template))
    assert (data.ledger.rows["empty"], len(data.train)) == (1, 1)


def test_training_refuses_what_it_cannot_learn_from(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data = prepared(jsonl(tmp_path, [pair]))
    assert [trained_text(example) for example in data.train] == ["b<|im_end|>", "c<|im_end|>"]
    assert [trained_text(e) for e in prepared(jsonl(tmp_path, [pair]), format="chosen").train] == ["b<|im_end|>"]


# Personal data


def test_personal_data_is_reported_redacted_or_refused(tmp_path: Path) -> None:
    secret = "jane.roe@company.com"
    rows = [{"prompt": f"write to {secret}", "completion": "sent"}, *distinct(2)]
    path = jsonl(tmp_path, rows)
    report = prepared(path)
    assert secret in text_of(report.train[0])
    redacted = prepared(path, pii="redact", validation=1, group="prompt")
    everything = [text_of(e) for e in (*redacted.train, *redacted.validation)]
    assert sum("write to [EMAIL]" in text for text in everything) == 1
    for data in (report, redacted):
        assert data.ledger.personal == {"email": 1}
        (line,) = data.personal().splitlines()
        assert json.loads(line) == {"place": "rows.jsonl:1", "kind": "email", "turn": 1, "start": 9, "end": 29}
    assert "rows.jsonl:1: personal data (email)" in refused(path, pii="refuse")
    assert secret not in refused(path, pii="refuse")
    assert prepared(path, pii="off").ledger.personal == {}
    assert (
        "[EMAIL]" in read_held_out(path, "--data", Data(train=path, pii="redact"), renderer(), 1)[0].conversation.text()
    )


# The cache


def test_a_second_start_reads_the_tokens_back(tmp_path: Path) -> None:
    path = jsonl(tmp_path, distinct(5))
    first, again = prepared(path), prepared(path)
    assert (first.ledger.was_cached, again.ledger.was_cached) == (False, True)
    assert [text_of(e) for e in first.train] == [text_of(e) for e in again.train]
    assert first.ledger.as_dict() | {"seconds": 0, "cached": True} == again.ledger.as_dict() | {"seconds": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 50},
        {"loss_on": "all"},
        {"system_prompt": "x"},
        {"pii": "redact"},
        {"chat_template": "alpaca"},
        {"limit": 2},
    ],
)
def test_whatever_changes_the_tokens_makes_them_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    path = jsonl(tmp_path, distinct(5))
    assert not prepared(path).ledger.was_cached
    assert not prepared(path, **change).ledger.was_cached
    jsonl(tmp_path, distinct(6))
    assert not prepared(path).ledger.was_cached


def test_refused_data_leaves_nothing_in_the_cache(tmp_path: Path, empty_cache: Path) -> None:
    refused(jsonl(tmp_path, [GOOD, "{"]))
    assert [path for path in empty_cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_several_processes_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.data.sources.read.ROWS", 50, raising=False)
    path = jsonl(tmp_path, distinct(2500))
    one = prepared(path, workers=1)
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "other"))
    before = os.times().children_user
    two = prepared(path, workers=2)
    assert os.times().children_user > before, "the work was done by others"
    assert not two.ledger.was_cached
    assert one.ledger.sha256 == two.ledger.sha256
    assert one.ledger.rows == two.ledger.rows


def test_chat_data_without_a_template_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"messages": turns(CHAT)}])
    with pytest.raises(UserError, match="the base model has no chat template"):
        prepared(path, chat=False)
    assert len(prepared(jsonl(tmp_path, [GOOD]), chat=False).train) == 1


def test_long_text_is_cut_into_pieces_that_lose_no_token(tmp_path: Path) -> None:
    texts = [" ".join(str(np.random.default_rng(n).choice(WORDS)) for n in range(at, at + 60)) for at in (0, 100)]
    path = jsonl(tmp_path, [{"text": text} for text in texts])
    whole = prepared(path)
    cut = prepared(path, max_length=16)
    assert whole.ledger.rows["used"] == cut.ledger.rows["used"] == 2
    assert cut.ledger.notes["chunked"] == 2
    assert any("2 rows of text longer than data.max_length: cut into pieces" in told for told in cut.ledger.warnings)
    assert max(cut.train.lengths) == 16
    # Every token that was trained is, once: of a whole text all but the first.
    assert cut.ledger.tokens["trained"] == whole.ledger.tokens["trained"]
    assert "".join(map(trained_text, cut.train)) == "".join(map(trained_text, whole.train))
    # A piece goes on from the last token of the one before.
    first, second = cut.train[0], cut.train[1]
    assert first.ids[-1] == second.ids[0]
    assert prepared(path, max_length=16, packing=True).ledger.pack["efficiency"] > 0.8


def test_pieces_begin_with_the_begin_token_where_the_tokenizer_has_one() -> None:
    ids = np.arange(1, 21, dtype=np.int32)
    pieces = Example(ids, ((1, 20, 1.0),), "p").pieces(8, np.array([1], dtype=np.int32))
    assert [piece.ids.tolist() for piece in pieces] == [list(range(1, 9)), [1, *range(9, 16)], [1, *range(16, 21)]]
    assert [piece.spans for piece in pieces] == [((1, 8, 1.0),), ((1, 8, 1.0),), ((1, 6, 1.0),)]


def test_only_text_is_cut_into_pieces(tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "completion": "the dog " * 40}, GOOD]
    assert prepared(jsonl(tmp_path, rows), max_length=32).ledger.rows["overlong"] == 1
    path = jsonl(tmp_path, [{"text": "the cat " * 40}, {"text": "the dog"}], "texts.jsonl")
    assert prepared(path, max_length=16, overlong="drop").ledger.rows["overlong"] == 1


def test_all_pieces_of_held_out_text_are_measured(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": f"{n} " + "the cat says " * 20} for n in range(2)])
    found = prepared(path, max_length=16, duplicates="keep", validation=path)
    assert len(found.held_out()) == len(found.validation) > 4


def test_ignored_columns_are_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [GOOD | {"context": "c", "label": 0}, GOOD | {"prompt": "the hen", "context": ""}])
    found = prepared(path, ignore_columns=["context", "label"])
    assert found.ledger.notes["ignored_columns"] == 1
    assert found.ledger.formats["rows.jsonl"]["format"] == "prompt-completion"
    assert "c\n" not in text_of(found.train[0])


def test_rows_that_bring_control_tokens_are_refused_or_read_as_the_setting_says(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [GOOD | {"completion": "the dog<|im_end|>\n"}])
    assert "rows.jsonl:1: turn 2 ends with <|im_end|>" in refused(path)
    found = prepared(path, special_tokens_in_text="strip")
    assert found.ledger.notes["control_tokens_stripped"] == 1
    assert trained_text(found.train[0]) == "the dog<|im_end|>"
    text = jsonl(tmp_path, [{"text": "<|im_start|>user\nthe cat<|im_end|>"}], "text.jsonl")
    assert "the text begins with <|im_start|>" in refused(text)
    control, letters = (prepared(text, special_tokens_in_text=how).train[0] for how in ("control", "text"))
    assert len(control.ids) < len(letters.ids)
    assert control.ids.tolist().count(tiny_tokenizer().eos_token_id) == 1, "it brings its own end token"


def test_rows_beyond_the_longest_are_bad_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [GOOD, {"prompt": "the owl", "completion": "the hen " * 500}])
    assert "rows.jsonl:2: is longer than data.max_row_bytes = 1,024" in refused(path, max_row_bytes=1024)
    found = prepared(path, max_row_bytes=1024, bad_rows="drop")
    assert (found.ledger.rows["unreadable"], found.ledger.rows["used"]) == (1, 1)


def test_files_of_other_splits_are_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    for number, name in enumerate(("train-00000-of-00001", "test-00000-of-00001", "more")):
        jsonl(tmp_path / "set" / "data", distinct(4, 10 * number), f"{name}.jsonl")
    found = prepared(str(tmp_path / "set"))
    assert sorted(found.ledger.formats) == ["more.jsonl", "train-00000-of-00001.jsonl"]
    assert any("test (1, as test-00000-of-00001.jsonl)" in told for told in found.ledger.warnings)
    assert list(prepared(str(tmp_path / "set" / "data" / "test*")).ledger.formats) == ["test-00000-of-00001.jsonl"]
    (tmp_path / "set" / "data" / "more.jsonl").unlink()
    assert len(prepared(str(tmp_path / "set" / "data" / "*"), split="test").train) == 4
    assert "holds files of several splits: test, train" in refused(
        jsonl(tmp_path, [GOOD]), validation=str(tmp_path / "set")
    )


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"fates": {}}'])
def test_a_damaged_account_or_list_of_checksums_is_told(tmp_path: Path, content: bytes) -> None:
    for name in ("account.json", "checksums.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"account\.json: (damaged|cannot be read)"):
        Corpus(tmp_path)
    with notified("damaged; the rows are tokenized again"):
        assert not is_sound(tmp_path)
