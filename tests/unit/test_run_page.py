"""The page of a run: from its folder alone, whole, and with nothing from elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from veneer.config import Run, RunFolder
from veneer.config.folder import write_json, write_text
from veneer.config.load import to_yaml
from veneer.report.run_page import run_page, shown_of, write_run_page

SHARE = {"value": 0.7, "low": 0.6, "high": 0.8}


def sample(name: str, right: bool) -> dict[str, Any]:
    return {
        "place": f"{name}.jsonl:1",
        "prompt": f"message {name} <b>",
        "reference": "{}",
        "base": "no",
        "base_with_examples": "maybe",
        "tuned": "{}" if right else "[]",
        "base_right": False,
        "tuned_right": right,
    }


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run's folder as the demo leaves it, with numbers to be found again."""
    run = RunFolder(tmp_path / "demo")
    settings = Run.model_validate({"model": {"base": "smollm2-135m-instruct"}, "data": {"train": "rows.jsonl"}})
    write_text(run.run, to_yaml(settings))
    values: dict[str, Any] = {
        name: SHARE for name in ("base", "base_with_examples", "tuned", "difference", "difference_with_examples")
    }
    paired = {"rows": 120, "wrong_to_right": 3, "right_to_wrong": 1, "verdict": "same", "difference": SHARE}
    values["unit"] = "share"
    metrics = {"record": values | {"tuned": SHARE | {"value": 0.875}}, "field.team": values}
    write_json(run.evaluation, {"metrics": metrics, "rows": 120, "exported": paired})
    lines = [sample("a", False), sample("b", True), sample("c", True), sample("d", True)]
    write_text(run.samples, "".join(json.dumps(line) + "\n" for line in lines))
    records = [{"kind": "train", "step": step, "loss": 4 / step} for step in range(1, 31)]
    records.append({"kind": "eval", "step": 30, "loss": 0.25})
    write_text(run.metrics, "".join(json.dumps(record) + "\n" for record in records))
    write_text(run.adapter / "adapter_model.safetensors", "x" * 5000)
    return run


def test_it_holds_scores_loss_and_answers_and_needs_nothing_else(folder: RunFolder) -> None:
    path = write_run_page(folder)
    page = path.read_text()
    assert path.name == "report.html"
    assert "<b>88 %</b> exactly right" in page
    assert "<b>same</b>" in page
    assert ">team<" in page
    assert page.count("<polyline") == 2
    assert "held-out 0.250" in page
    assert "adapter/" in page
    assert "5.0 kB" in page
    assert "message b &lt;b&gt;" in page, "text of rows is escaped"
    assert not re.search(r'(src|href)="|url\(|<script|https?://', page)


def test_it_is_well_formed(folder: RunFolder) -> None:
    open_tags: list[str] = []

    class PageReader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "br", "line", "circle", "polyline"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("meta", "br", "line", "circle", "polyline"):
                assert open_tags.pop() == tag

    PageReader().feed(run_page(folder.path))
    assert not open_tags


def test_points_of_the_curve_lie_in_the_picture(folder: RunFolder) -> None:
    page = run_page(folder.path)
    for points in re.findall(r'points="([^"]+)"', page):
        places = [tuple(map(float, point.split(","))) for point in points.split()]
        assert len(places) == 30
        assert all(0 <= x <= 720 and 0 <= y <= 200 for x, y in places)
        assert places[0][1] < places[-1][1], "the loss falls, so the line goes down"


def test_a_run_without_evaluation_has_a_page_too(folder: RunFolder) -> None:
    folder.evaluation.unlink()
    folder.metrics.unlink()
    page = run_page(folder.path)
    assert "Scores" not in page
    assert "<svg" not in page
    assert "smollm2-135m-instruct" in page


def test_answers_are_chosen_by_rule() -> None:
    rows = [sample("a", False), sample("b", True), sample("c", False), sample("d", True), sample("e", True)]
    assert [row["place"][0] for row in shown_of(rows)] == ["b", "d", "a"]
    assert [row["place"][0] for row in shown_of(rows[::2][:2])] == ["a"]
    assert shown_of([]) == []
