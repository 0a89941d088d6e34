"""Every row of every kind of file and of every format has one fate, and the ledger counts them and their tokens."""

import csv
import gzip
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.rows import GOOD, distinct, jsonl, prepared, turns
from tests.support.tiny import tiny_tokenizer
from veneer.config import Data
from veneer.data.formats import FORMATS
from veneer.data.labelled import LabelledRenderer
from veneer.data.ledger import FATES, length_summary
from veneer.data.pipeline import prepare
from veneer.data.tagging import TaggedRenderer
from veneer.data.texts import TextsRenderer

pytestmark = pytest.mark.usefixtures("empty_cache")


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {}


def writer(name: str) -> Any:
    def keep(function: Any) -> Any:
        WRITERS[name] = function
        return function

    return keep


@writer("json lines")
def _json_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@writer("gzip")
def _gzip(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


@writer("zstd")
def _zstd(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "a.json.zst"
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(json.dumps(rows).encode())
    return path


@writer("json array")
def _json_array(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "a.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


@writer("csv")
def _csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "a.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


@writer("parquet")
def _parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@writer("arrow folder")
def _arrow_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(folder / "a")
    return folder / "a"


OF_READING: tuple[dict[str, Any], ...] = ({}, {"limit": 7}, {"sample": 6})
OF_ROWS: tuple[dict[str, Any], ...] = (
    {"duplicates": "keep"},
    {"duplicates": "drop-near"},
    {"overlong": "truncate", "max_cut_rows": 0.5},
    {"validation": 3},
    {"pii": "refuse", "bad_rows": "drop"},
)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*product(WRITERS, OF_READING), *product(("json lines", "parquet"), OF_ROWS)],  # rows are the same from any file
)
def test_every_row_of_every_kind_of_file_has_one_fate(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """Prompt and completion of every fate; the counts must add up whatever the settings."""
    workers = 1 if settings else None  # an Arrow folder starts a pool where nothing is said
    rows = [*distinct(8), GOOD, GOOD, GOOD | {"completion": " "}, GOOD | {"completion": "the dog " * 90}]
    rows += [GOOD | {"prompt": "x " * 200}, GOOD | {"prompt": "mail me: jane.roe@company.com"}]
    path = WRITERS[kind](tmp_path, rows)
    ledger = prepared(str(path), max_length=100, workers=workers, **settings).ledger.as_dict()
    counts = ledger["rows"]
    assert counts["read"] == settings.get("limit", settings.get("sample", len(rows)))
    assert counts["read"] == sum(counts[fate] for fate in FATES)
    assert counts["used"] == counts["training"] + counts["validation"]
    assert counts["validation"] == settings.get("validation", 0)
    if not settings:
        assert [counts[fate] for fate in FATES] == [10, 0, 1, 1, 2, 0]
        assert ledger["personal"] == {"email": 1}
    if kind != "json lines":
        return
    # Broken rows are counted where they may be left out.
    with path.open("a") as file:
        file.write('{"prompt": \n[1]\n{"prompt": "a", "completion": 3}\n')
    counts = prepared(str(path), max_length=100, workers=workers, **({"bad_rows": "drop"} | settings)).ledger.as_dict()[
        "rows"
    ]
    assert counts["read"] == sum(counts[fate] for fate in FATES)
    if not {"limit", "sample"} & set(settings):
        assert (counts["read"], counts["unreadable"]) == (len(rows) + 3, 2)


ONE_OF_EACH: dict[str, list[dict[str, Any]]] = {  # good, empty, cannot be right
    "messages": [{"messages": turns([("user", "a"), ("assistant", text)])} for text in ("b", " ")]
    + [{"messages": [{"role": "robot", "content": "a"}]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": t}]} for t in ("b", "")]
    + [{"conversations": [{"from": "human", "value": "a"}]}],
    "alpaca": [{"instruction": "a", "output": text} for text in ("b", None, 3)],
    "prompt-completion": [{"prompt": "a", "completion": text} for text in ("b", "", 3)],
    "question-answer": [{"question": "a", "answer": text} for text in ("b", "", ["c"])],
    "guanaco": [{"text": "### Human: a" + text} for text in ("### Assistant: b", "### Assistant:", "")],
    "text": [{"text": text} for text in ("a", " ", None)],
    "preference": [{"prompt": "a", "chosen": text, "rejected": "c"} for text in ("b", "", "c")],
    "rated": [
        {"prompt": "a", "completion": text, "label": label} for text, label in (("b", True), ("", True), ("c", 3))
    ],
    "chosen": [{"prompt": "a", "chosen": text, "rejected": "c"} for text in ("b", "", "c")],
    "labelled": [{"text": text, "label": label} for text, label in (("b", "x"), (" ", "x"), ("b", "z"))],
    "tagged": [{"tokens": words, "tags": ["x"]} for words in (["b"], [" "], ["b", "c"])],
    "text-pair": [{"anchor": "a", "positive": text} for text in ("b", " ", 3)],
}
OF_HEADS: dict[str, Callable[..., LabelledRenderer]] = {  # formats of a renderer of their own
    "labelled": partial(LabelledRenderer, labels=("x", "y")),
    "tagged": partial(TaggedRenderer, labels=("x", "y")),
    "text-pair": TextsRenderer,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_of_every_format_has_one_fate(tmp_path: Path, name: str) -> None:
    path = jsonl(tmp_path, [*ONE_OF_EACH[name], ONE_OF_EACH[name][0], "[1]"])
    if name in OF_HEADS:
        data = Data.model_validate({"train": path, "validation": 0, "bad_rows": "drop"})
        counts = prepare(data, OF_HEADS[name](tiny_tokenizer(), data), seed=0).ledger.as_dict()["rows"]
    else:
        counts = prepared(path, format=name, bad_rows="drop").ledger.as_dict()["rows"]
    empty = 0 if name in OF_HEADS else 1  # a text without a word cannot have a label
    expected = {"used": 1, "empty": empty, "refused": 2 - empty, "duplicate": 1, "unreadable": 1, "overlong": 0}
    assert {fate: counts[fate] for fate in expected} == expected
    assert counts["read"] == 5


def test_the_ledger_counts_the_tokens_of_the_training_rows(tmp_path: Path) -> None:
    data = prepared(jsonl(tmp_path, distinct(12)), validation=3)
    ledger = data.ledger.as_dict()
    examples = list(data.train)
    assert ledger["tokens"] == {
        "total": sum(len(example.ids) for example in examples),
        "trained": sum(example.trained for example in examples),
        "end_of_turn": 9,
        "longest_row": max(len(example.ids) for example in examples),
        "examples": 9,
    }
    assert data.train.lengths.tolist() == [len(example.ids) for example in examples]
    assert 0 < ledger["packing"]["efficiency"] <= 1
    assert sum(bar["rows"] for bar in ledger["lengths"]["histogram"]) == 12
    assert ledger["format"] == "prompt-completion"
    assert ledger["files"]["rows.jsonl"]["reason"] == "the fields `prompt`, `completion`"


def test_rows_left_out_are_named(tmp_path: Path) -> None:
    ledger = prepared(jsonl(tmp_path, [GOOD, "{", GOOD | {"completion": ""}]), bad_rows="drop").ledger.as_dict()
    assert [(problem["place"], problem["fate"]) for problem in ledger["problems"]] == [
        ("rows.jsonl:2", "unreadable"),
        ("rows.jsonl:3", "empty"),
    ]
    assert "broken JSON" in ledger["problems"][0]["reason"]
    assert "1 row cannot be read: left out" in ledger["warnings"]


def test_percentiles_are_those_of_the_rows() -> None:
    from collections import Counter

    summary = length_summary(Counter(range(1, 101)))
    assert summary["percentiles"] == {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert sum(bar["rows"] for bar in summary["histogram"]) == 100
