"""Veneer from Python: rows as objects, listeners, and names that stand beside packages of their own."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest

import veneer
import veneer.training
from tests.support.runs import tiny_run
from veneer.config import Data, RunFolder, UserError, load_run, run_of
from veneer.config.load import to_yaml
from veneer.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("empty_cache")
Models = Callable[..., Path]
Rows = list[dict[str, Any]]


def written(value: Any) -> Rows:
    """The rows of the file that `data.train` names for some rows."""
    train = Data(train=value).train
    assert isinstance(train, str)
    return [json.loads(line) for line in Path(train).read_text().splitlines()]


def test_a_package_and_a_function_of_like_names_live_side_by_side() -> None:
    assert callable(veneer.train)
    assert veneer.training.__name__ == "veneer.training"
    assert {"Run", "train", "plan", "prepare", "evaluate", "generate", "merge", "export", "certify", "load"} <= set(
        veneer.__all__
    )
    for name in veneer.__all__:
        assert getattr(veneer, name) is not None


def test_a_run_on_objects_is_a_run_on_a_file_that_its_record_names(
    tiny_model: Models, tmp_path: Path, rows: Rows
) -> None:
    out = tmp_path / "run"
    run = tiny_run(tiny_model(), "-", out, data={"train": rows[2:], "validation": rows[:2]})
    veneer.train(run)
    record = load_run(RunFolder(out).run)
    assert record == run.model_copy(update={"data": record.data})
    assert record.data.model_copy(update={"template_date": None}) == run.data
    ledger = json.loads(RunFolder(out).ledger.read_text())
    assert (ledger["rows"]["training"], ledger["rows"]["validation"]) == (14, 2)
    assert set(ledger["files"]) == {"train.jsonl", "validation.jsonl"}
    # A later process that has the same rows goes on with the same run.
    again = tiny_run(tiny_model(), "-", out, data={"train": rows[2:], "validation": rows[:2]})
    assert veneer.train(again, resume="auto").steps == 6
    other = tiny_run(tiny_model(), "-", out, data={"train": rows[3:], "validation": rows[:2]})
    with pytest.raises(UserError, match=r"other settings\n  data\.train: was .*train\.jsonl"):
        veneer.train(other, resume="auto")


def test_a_list_a_dataset_and_a_frame_give_the_same_rows(rows: Rows) -> None:
    table = datasets.Dataset.from_list(rows)
    assert written(rows) == written(tuple(rows)) == written(table) == written(pandas.DataFrame(rows)) == rows
    assert Data(train=rows).train == Data(train=table).train == Data(train=pandas.DataFrame(rows)).train
    assert written(table.select([3, 1])) == [rows[3], rows[1]]
    assert written(table.with_format("numpy")) == rows


def test_fields_that_a_table_lacks_are_not_in_its_rows() -> None:
    calls = [{"name": "find", "arguments": {"a": 1}}, {"name": "find", "arguments": {"b": "x"}}]
    rows = [{"messages": [{"role": "assistant", "call": call}]} for call in calls]
    assert written(datasets.Dataset.from_list(rows)) == rows
    frame = pandas.DataFrame([{"text": "a", "label": True, "size": 1}, {"text": "b", "day": date(2026, 7, 31)}])
    frame["when"] = pandas.to_datetime(["2026-01-02", None])
    first, second = written(frame)
    assert first == {"text": "a", "label": True, "size": 1.0, "when": "2026-01-02T00:00:00"}
    assert second == {"text": "b", "day": "2026-07-31"}
    assert written([{"text": None}]) == [{"text": None}], "what a dict says stays as it is, as in a file of JSON"


def test_values_of_numpy_are_those_of_python() -> None:
    row = {"text": "a", "n": np.int64(3), "x": np.float32(0.5), "v": np.arange(2)}
    assert written([row]) == [{"text": "a", "n": 3, "x": 0.5, "v": [0, 1]}]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "data.train: there are no rows in this list"),
        (datasets.Dataset.from_list([]), "data.train: there are no rows in this Dataset"),
        ([{"text": "a"}, "b"], "data.train: row 2 is of type str; a row is a dict"),
        (["a.jsonl", {"text": "a"}], "data.train: row 1 is of type str"),
        ({"train": [{"text": "a"}]}, "data.train: an object of type dict is not taken as rows"),
        (iter([{"text": "a"}]), "an object of type list_iterator is not taken as rows"),
        ([{"text": "a"}, {"text": b"a"}], "data.train: row 2 cannot be written as JSON: .* type bytes"),
        (pandas.DataFrame([["a", "b"]], columns=["text", "text"]), "several columns of the DataFrame"),
    ],
)
def test_other_objects_are_refused_at_once(given: Any, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        veneer.Run(model={"base": "x"}, data={"train": given})
    assert "fix: " in str(caught.value)


def test_rows_are_objects_in_python_alone(empty_cache: Path) -> None:
    """A file or a command that writes rows where names belong is told so, with all other mistakes."""
    with pytest.raises(UserError, match=r"data\.train = .*fix: name a file") as caught:
        run_of({"model": {}, "data": {"train": [{"text": "a"}]}})
    assert "model.base" in str(caught.value)
    assert not empty_cache.exists()


def test_names_paths_and_numbers_stay_what_they_are(tmp_path: Path) -> None:
    assert Data(train="a.jsonl", validation=3) == Data(train=Path("a.jsonl"), validation=3)
    assert Data(train=("a.jsonl", "b.jsonl")).train == ("a.jsonl", "b.jsonl")
    assert Data(train=[Path("a.jsonl"), "b.jsonl"]).train == ("a.jsonl", "b.jsonl")
    with pytest.raises(UserError, match=r"(?s)Run: 2 mistakes.*data\.validation = -1.*did you mean `learning_rate`"):
        veneer.Run(model={"base": "x"}, data={"train": "a", "validation": -1}, train={"learningrate": 1})
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(veneer.Run(model={"base": "x"}, data={"train": [{"text": "a"}]})))
    assert load_run(path).data.train == Data(train=[{"text": "a"}]).train


def test_prepare_gives_what_training_takes(tiny_model: Models, tmp_path: Path, rows: Rows) -> None:
    run = tiny_run(tiny_model(), "-", tmp_path / "run", data={"train": rows, "validation": 2})
    prepared = veneer.prepare(run, samples=2)
    assert (len(prepared.train), len(prepared.validation), len(prepared.samples)) == (14, 2, 2)
    assert prepared.train[0].place.startswith("train.jsonl:")
    assert len(prepared.train[0].ids) == len(prepared.train[0].weights)
    veneer.train(run)
    assert json.loads(RunFolder(tmp_path / "run").ledger.read_text())["sha256"] == prepared.ledger["sha256"]


def test_a_listener_is_a_function_of_a_record(tiny_model: Models, tmp_path: Path, rows: Rows) -> None:
    heard: list[dict[str, Any]] = []
    run = tiny_run(tiny_model(), "-", tmp_path / "run", data={"train": rows, "validation": 2})
    veneer.train(run, listeners=[heard.append])
    assert heard == read_metrics(RunFolder(tmp_path / "run").metrics)
    assert [record["kind"] for record in heard] == ["train"] * 6 + ["eval"]
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    for record in heard:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{record['kind']}` |")]
        assert line == f"| `{record['kind']}` | " + ", ".join(f"`{key}`" for key in record if key != "kind") + " |"
