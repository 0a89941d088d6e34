"""`veneer report`: one run's page made anew, several runs on one, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.notices import notified
from tests.support.run_folders import append_line, eval_record, make_run, train_record
from veneer.config import UserError
from veneer.report.runs_page import names_of

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    made = []
    for number, name in enumerate(("first", "second")):
        records: list[dict[str, Any]] = [train_record(step, 2.0 - number / 2) for step in range(1, 11)]
        path = make_run(tmp_path / name, [*records, eval_record(10, 1.5 - number / 2)], is_finished=True)
        (path / "run.yaml").write_text(f"model: {{base: org/base}}\ntrain: {{learning_rate: {number + 1}, seed: 1}}\n")
        made.append(path)
    return made[0], made[1]


def test_one_run(runs: tuple[Path, Path], call: Call) -> None:
    append = runs[0] / "metrics.jsonl"
    append.write_text("torn\n" + append.read_text())
    with notified("metrics.jsonl: line 1 is damaged and left out"):
        status, out, _ = call("report", str(runs[0]), "--json")
    assert status == 0
    found = json.loads(out)
    assert found["file"] == str(runs[0] / "report.html")
    assert "1 is damaged" in found["damaged"][0]
    assert "10" in (runs[0] / "report.html").read_text()


def test_several_runs_on_one_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    made = veneer.write_report(*runs, out=tmp_path / "both.html")
    page = made.file.read_text()
    for shown in ("first", "second", "train.learning_rate", "<td>2</td>", "1.5", ">held-out loss<"):
        assert shown in page
    assert "train.seed" not in page, "what is the same in both is left out"
    assert '"run":"second"' in page, "its loss is drawn"
    assert not (runs[0] / "report.html").exists()


def test_names_tell_folders_apart() -> None:
    assert names_of([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert names_of([Path("/a/one"), Path("/a/two")]) == ["one", "two"]


def test_what_is_no_run_is_refused_and_nothing_written(runs: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    for given, said in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no run")):
        status, out, err = call("report", str(runs[0]), str(given), "--out", str(tmp_path / "page.html"))
        assert (status, out) == (2, "")
        assert said in err
    status, _, err = call("report", str(runs[0]), "--out", str(tmp_path))
    assert (status, "is a folder" in err) == (2, True)
    assert not list(tmp_path.glob("*.html"))
    with pytest.raises(UserError, match="no run is named"):
        veneer.write_report()
    many = [make_run(tmp_path / f"run-{n}") for n in range(9)]
    with pytest.raises(UserError, match="at most 8"):
        veneer.write_report(*many)
    append_line(runs[0] / "metrics.jsonl", {"kind": "divergence", "step": 4, "reason": "a spike", "action": "none"})
    assert "a spike: none" in veneer.write_report(runs[0]).file.read_text()
