"""What comes back of training rows: which passages are asked for, and a model that has learnt its rows by heart."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

import veneer
from tests.support.runs import tiny_run, write_rows
from veneer.data.batch import Example
from veneer.evaluation.suites.memorisation import passages_of, sample

Call = Callable[..., tuple[int, str, str]]


def example(tokens: int, *spans: tuple[int, int, float]) -> Example:
    return Example(np.arange(tokens, dtype=np.int32), spans, "rows:1")


def test_passages_are_the_last_answer_or_the_middle_of_a_text() -> None:
    chat = example(90, (10, 20, 1.0), (30, 90, 1.0))
    short = example(40, (30, 40, 1.0))
    text, brief = example(120, (1, 120, 1.0)), example(99, (1, 99, 1.0))
    found = passages_of([chat, short, text, brief, example(5)])
    assert [(passage.prompt[-1], passage.following) for passage in found] == [
        (29, list(range(30, 80))),
        (49, list(range(50, 100))),
    ]


def test_the_end_of_a_turn_is_no_part_of_an_answer() -> None:
    (found,) = passages_of([example(47, (30, 47, 1.0))], {46})
    assert found.following == list(range(30, 46))


def test_a_sample_is_of_so_many_rows_and_always_the_same() -> None:
    rows = [example(n) for n in range(1, 40)]
    drawn = [len(row.ids) for row in sample(rows, 10, 3)]
    assert len(set(drawn)) == 10
    assert drawn == [len(row.ids) for row in sample(rows, 10, 3)]
    assert len(sample(rows, 100, 3)) == 39


def test_rows_learnt_by_heart_come_back_and_held_out_ones_do_not(
    tiny_model: Callable[..., Path], tmp_path: Path, call: Call
) -> None:
    draw = random.Random(1)
    rows = [
        {"prompt": f"say {word}", "completion": "".join(draw.choice("abcdefgh") for _ in range(20))}
        for word in ("cat", "dog", "owl", "hen", "fox", "elk")
    ]
    run = tiny_run(
        tiny_model(),
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        data={"validation": 2},
        train={"max_steps": 300, "learning_rate": 3e-3},
        adapter={"r": 16, "lora_alpha": 32},
    )
    veneer.train(run)
    status, out, error = call("evaluate", str(tmp_path / "run"), "--memorisation", "100", "--json")
    assert status == 0, error
    found = json.loads(out)["memorisation"]
    assert (found["rows"], found["measured"]) == (4, 4)
    assert found["base"]["value"] == 0
    assert found["tuned"]["value"] >= 0.75
    assert found["held_out"]["value"] == 0
    assert "Memorisation: of 4 training rows " in (tmp_path / "run" / "adapter" / "README.md").read_text()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "new", "completion": "row"}\n')
    status, _, error = call(
        "evaluate", str(tmp_path / "run"), "--memorisation", "9", "--data", str(tmp_path / "rows.jsonl")
    )
    assert status == 2
    assert "restore the data, or leave --memorisation out" in error
