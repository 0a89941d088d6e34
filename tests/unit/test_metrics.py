"""A metric is one function and one line of the registry: then all that shows scores shows it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import veneer
from tests.support.runs import tiny_run, write_rows
from veneer.evaluation import metrics
from veneer.evaluation.intervals import Interval
from veneer.evaluation.metrics import measure
from veneer.evaluation.metrics.metric import Sample, ScoredRows
from veneer.report.run_page import run_page

Call = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class MeanLetters:
    """Letters of a row's reference, as a mean over rows."""

    letters: list[int]
    unit: ClassVar[str] = ""

    @property
    def interval(self) -> Interval:
        mean = sum(self.letters) / len(self.letters)
        return Interval(mean, min(self.letters), max(self.letters))

    def difference(self, base: "MeanLetters") -> Interval:
        apart = [own - other for own, other in zip(self.letters, base.letters, strict=True)]
        return Interval(sum(apart) / len(apart), min(apart), max(apart))


def made_up(rows: ScoredRows) -> dict[str, MeanLetters]:
    return {"letters": MeanLetters([20 + len(sample.reference) for sample in rows.samples])}


def test_a_new_metric_is_in_the_file_the_table_the_page_and_the_card(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    rows: list[dict[str, Any]],
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", data={"validation": 2})
    veneer.train(made)
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, made_up))
    monkeypatch.setenv("COLUMNS", "160")
    status, table, error = call("evaluate", str(tmp_path / "run"))
    assert status == 0, error
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]
    assert list(found) == ["exact_match", "perplexity", "letters"]
    assert {"base", "tuned", "difference"} <= set(found["letters"])
    value, spread = found["letters"]["tuned"]["value"], found["letters"]["difference"]
    assert value > 20
    assert spread == {"value": 0, "low": 0, "high": 0}
    row = next(line for line in table.splitlines() if "letters" in line).split()
    assert row[1] == f"{value:.3g}", "a number as it is, not in percent"
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"| letters | {value:.4g} (" in card
    assert "type: letters" in card
    page = run_page(tmp_path / "run")
    assert "letters" in page


def test_metrics_that_do_not_apply_have_no_result() -> None:
    assert measure(ScoredRows([])) == {}
    assert list(measure(ScoredRows([], [2.0, 3.0], [1.0, 1.0]))) == ["perplexity"]
    assert list(measure(ScoredRows([Sample("rows:1", "q", "a", "a")]))) == ["exact_match"]
