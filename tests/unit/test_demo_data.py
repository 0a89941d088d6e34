"""The promises of the bundled demo data: sizes, schema, balance, and that no part tells anything of another's rows."""

import csv
import io
import json
import re
from collections import Counter
from importlib import resources
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest

TEAMS = {"billing", "shipping", "technical", "account", "sales"}
NAMES = json.loads((Path(__file__).parent / "demo_names.json").read_text(encoding="utf-8"))
Rows = list[tuple[str, dict[str, str | None]]]
PARTS = {"train": 480, "dev": 120, "test": 120}
EACH_WAY = pytest.mark.parametrize(("part", "other"), list(permutations(PARTS, 2)))
EACH_PAIR = pytest.mark.parametrize(("part", "other"), list(combinations(PARTS, 2)))


def test_rows_to_classify_are_the_demos_messages_with_their_team() -> None:
    for part in ("train", "test"):
        text = resources.files("veneer.data").joinpath(f"demo/routing_{part}.csv").read_text(encoding="utf-8")
        rows = list(csv.reader(io.StringIO(text)))
        assert rows[0] == ["text", "label"]
        assert [tuple(row) for row in rows[1:]] == [(message, answer["team"]) for message, answer in load(part)]


def load(part: str) -> Rows:
    """Message and answer of each row."""
    text = resources.files("veneer.data").joinpath(f"demo/{part}.jsonl").read_text(encoding="utf-8")
    rows = []
    for line in text.splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        answer = json.loads(assistant["content"])
        assert assistant["content"] == json.dumps(answer)
        rows.append((user["content"], answer))
    return rows


DATA = {part: load(part) for part in PARTS}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", re.sub(r"(?<=\w)['’.,-](?=\w)", "", text.lower()))


def name_words(text: str) -> set[str]:
    """Words in both readings: joined at hyphens (`r200`) and split there (`r`, `200`)."""
    return set(words(text)) | set(re.findall(r"[a-z0-9]+", re.sub(r"(?<=\w)['’](?=\w)", "", text.lower())))


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[at : at + n]) for at in range(len(found) - n + 1)}


def products(part: str) -> set[str]:
    return {answer["product"] for _, answer in DATA[part] if answer["product"] is not None}


@pytest.mark.parametrize(("part", "rows"), PARTS.items())
def test_sizes_schema_and_balance(part: str, rows: int) -> None:
    data = DATA[part]
    assert len(data) == rows
    for message, answer in data:
        assert list(answer) == ["team", "urgency", "product"]
        assert answer["team"] in TEAMS
        assert answer["urgency"] in {"low", "normal", "high"}
        assert answer["product"] is None or answer["product"] in message
    teams = Counter(answer["team"] for _, answer in data)
    assert all(0.14 <= count / rows <= 0.28 for count in teams.values())
    assert 0.1 <= sum(answer["product"] is None for _, answer in data) / rows <= 0.15


@EACH_WAY
def test_no_word_of_a_product_occurs_in_another_part(part: str, other: str) -> None:
    forbidden = set().union(*map(name_words, products(other)))
    assert len(products(other)) >= 15
    for message, _ in DATA[part]:
        assert not forbidden & name_words(message), message


@EACH_WAY
def test_no_person_occurs_in_another_part(part: str, other: str) -> None:
    forbidden = {word for name in NAMES[other] for word in words(name) if len(word) > 1}
    for message, _ in DATA[part]:
        capitalised = {word.lower() for word in re.findall(r"[A-Za-z']+", message) if word[0].isupper()}
        assert not forbidden & capitalised, message


@EACH_PAIR
def test_no_five_words_in_a_row_are_shared(part: str, other: str) -> None:
    seen = set().union(*(grams(message, 5) for message, _ in DATA[part]))
    for message, _ in DATA[other]:
        assert not seen & grams(message, 5), message


@EACH_PAIR
def test_no_number_is_shared(part: str, other: str) -> None:
    numbers = {name: set(re.findall(r"\d{3}-\d{4}|\d{4,}", " ".join(m for m, _ in DATA[name]))) for name in DATA}
    assert numbers[part]
    assert not numbers[part] & numbers[other]


def test_no_two_messages_are_alike() -> None:
    messages = [message for part in DATA.values() for message, _ in part]
    triples = [grams(message, 3) for message in messages]
    for n, mine in enumerate(triples):
        for theirs in triples[:n]:
            assert len(mine & theirs) <= 0.6 * min(len(mine), len(theirs))


def test_nothing_in_it_is_personal() -> None:
    text = " ".join(message for part in DATA.values() for message, _ in part)
    assert all(host.rstrip(".") == "example.com" for host in re.findall(r"@([\w.-]+)", text))
    assert all(re.fullmatch(r"555-01\d\d", phone) for phone in re.findall(r"\b\d{3}-\d{4}\b", text))


@pytest.mark.parametrize(("name", "part", "rows"), [("pairs", "train", 160), ("dev_pairs", "dev", 50)])
def test_pairs_teach_the_new_rule_and_nothing_else(name: str, part: str, rows: int) -> None:
    old = dict(DATA[part])
    pairs = [json.loads(line) for line in bundled(name).splitlines()]
    assert len({pair["prompt"] for pair in pairs}) == len(pairs) == rows
    changed = 0
    for pair in pairs:
        before, chosen, rejected = old[pair["prompt"]], json.loads(pair["chosen"]), json.loads(pair["rejected"])
        assert chosen == by_new_rule(before)
        assert rejected == (before if before["product"] is None else before | {"product": "none"})
        changed += chosen != before
    assert rows / 3 < changed <= rows / 2


def test_the_test_messages_have_their_answers_by_the_new_rule() -> None:
    rows = [json.loads(line)["messages"] for line in bundled("rule_test").splitlines()]
    found = [(user["content"], json.loads(assistant["content"])) for user, assistant in rows]
    assert found == [(message, by_new_rule(answer)) for message, answer in DATA["test"]]
    assert sum(answer != dict(DATA["test"])[message] for message, answer in found) == 18


def bundled(name: str) -> str:
    return resources.files("veneer.data").joinpath(f"demo/{name}.jsonl").read_text(encoding="utf-8")


def by_new_rule(answer: dict[str, Any]) -> dict[str, Any]:
    return answer | {"product": answer["product"] or "none"}
