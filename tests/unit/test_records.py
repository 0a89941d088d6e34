"""docs/metrics.md tells every key of metrics.jsonl: records of tiny runs of each kind hold no other one."""

import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from tools.metrics_page import metrics_page

import veneer
from tests.support.classifiers import classify, save_tiny_base, some_texts
from tests.support.runs import some_pairs, some_rows, tiny_run, write_rows
from veneer.config.records import RECORDS
from veneer.training.metrics import read_metrics

Models = Callable[..., Path]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read from JSON has a type."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, inside[0])
    if origin is Literal:
        return value in inside
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inside)
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, inside[1]) for one in value.values())
    if origin is list:
        return isinstance(value, list) and all(fits(one, inside[0]) for one in value)
    if origin is tuple:
        return len(value) == len(inside) and all(map(fits, value, inside))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def faults(record: dict[str, Any], during: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """What a record has that its table does not say, or lacks of what it says."""
    kind: Any = RECORDS[record["kind"]]
    hints = get_type_hints(kind)
    found = [f"{key}: not in the table" for key in record if key not in hints and key not in during]
    found += [f"{key}: missing" for key in kind.__required_keys__ if key not in record]
    return found + [f"{key} = {record[key]!r}" for key in hints if key in record and not fits(record[key], hints[key])]


def records_of(run: veneer.Run) -> list[dict[str, Any]]:
    veneer.train(run)
    found = read_metrics(run.train.output_dir / "metrics.jsonl")
    assert {record["kind"] for record in found} == {"train", "eval"}
    return found


def test_the_page_is_made_from_the_records() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == metrics_page(), "run `make docs`"


def test_a_key_of_no_table_and_a_wrong_type_are_found() -> None:
    record = {"kind": "eval", "step": 1.5, "loss": None, "trained_tokens": 3, "best_step": 1, "time": "", "new": 0}
    assert faults(record) == ["new: not in the table", "best_value: missing", "step = 1.5"]


def test_supervised_runs(tiny_model: Models, tmp_path: Path) -> None:
    run = tiny_run(
        tiny_model(),
        write_rows(tmp_path / "rows.jsonl", some_rows()),
        tmp_path / "run",
        data={"validation": 4, "duplicates": "keep"},
        train={"max_steps": 2},
        evaluate={"during": ["exact_match"]},
    )
    for record in records_of(run):
        assert not faults(record, {"exact_match"})
    assert {"perplexity", "answered_rows", "exact_match"} <= set(record)


@pytest.mark.parametrize("train", [{}, {"dpo": {"rpo_alpha": 1.0}}, {"objective": "orpo"}, {"objective": "simpo"}])
def test_preference_runs(tiny_model: Models, tmp_path: Path, train: dict[str, Any]) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", some_pairs())
    data = {"validation": pairs, "duplicates": "keep"}
    run = tiny_run(tiny_model(), pairs, tmp_path / "run", data=data, train={"max_steps": 2, **train})
    for record in records_of(run):
        assert not faults(record)
    assert {"rewards/margins", "intervals", "lengths/correlation"} <= set(record)


def test_rated_runs(tiny_model: Models, tmp_path: Path) -> None:
    rows = [row | {"label": n % 2 == 0} for n, row in enumerate(some_rows())]
    file = write_rows(tmp_path / "rated.jsonl", rows)
    data = {"validation": file, "duplicates": "keep"}
    train = {"max_steps": 2, "per_device_train_batch_size": 8}
    for record in records_of(tiny_run(tiny_model(), file, tmp_path / "run", data=data, train=train)):
        assert not faults(record)
    assert "kl" in record


def test_classifiers(tmp_path: Path) -> None:
    run = classify(save_tiny_base("bert", tmp_path / "base"), some_texts(), tmp_path, train={"max_steps": 2})
    for record in records_of(run):
        assert not faults(record)
    assert {"accuracy", "macro_f1"} <= set(record)
