"""The page of a run: from its folder alone, whole, with nothing from elsewhere, and nothing in it that acts."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_folders import append_line, eval_record, make_run, train_record
from veneer.config import Run, RunFolder, UserError
from veneer.config.folder import write_json, write_text
from veneer.config.load import to_yaml
from veneer.report import charts, result_charts
from veneer.report.run_files import read_run
from veneer.report.run_page import run_page, write_run_page
from veneer.report.scores import shown_of, verdict_text
from veneer.report.series import running_mean, thin
from veneer.report.timeline import events_of

SHARE = {"value": 0.7, "low": 0.6, "high": 0.8}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}\u2028\x1b[2J"


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
    more = {"grad_norm_by_layer": [0.1, 0.2, None, 0.4]}
    records = [train_record(step, 4 / step, **more) for step in range(1, 31)] + [eval_record(30, 0.25)]
    write_text(run.metrics, "".join(json.dumps(record) + "\n" for record in records))
    write_text(run.adapter / "adapter_model.safetensors", "x" * 5000)
    return run


def data_of(page: str) -> dict[str, Any]:
    """What a page's script reads."""
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.DOTALL)
    assert found
    read: dict[str, Any] = json.loads(found[1])
    return read


class Tags(HTMLParser):
    """Tags of a page, with attributes; the text of scripts; whether all that opens is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.all.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self._open and self._open[-1] == "script" and not self.all[-1][1]:
            self.scripts.append(text)


def test_it_holds_scores_charts_and_answers_and_fetches_nothing(folder: RunFolder) -> None:
    page = write_run_page(folder).read_text()
    assert "<b>88 %</b> exactly right" in page
    assert "<b>same</b>" in page
    assert ">team<" in page
    assert "5.0 kB" in page
    assert "message b &lt;b&gt;" in page, "text of rows is escaped"
    tags = Tags(page)
    drawn = data_of(page)
    assert {"loss", "rate", "norm", "layers", "share", "speed", "memory", "timeline", "score-0"} <= set(drawn["charts"])
    assert set(drawn["charts"]) == {found["id"] for _, found in tags.all if found.get("class") == "chart"}
    assert drawn["reload"] is None, "a run that is over is not loaded again"
    assert not any(key in ("src", "href", "onerror") for _, found in tags.all for key in found)
    policy = next(found["content"] for tag, found in tags.all if "http-equiv" in found)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in tags.scripts]
    assert len(hashes) == 4
    assert all(f"'sha256-{one}'" in policy for one in hashes), "its own scripts alone run"


def test_nothing_of_a_run_breaks_out_of_its_page(folder: RunFolder) -> None:
    clean = Tags(run_page(folder.path)).all
    write_text(folder.run, f"model: {{base: {json.dumps(EVIL)}}}\ntrain: {{}}\n")
    write_text(folder.samples, json.dumps({**sample("b", True), "prompt": EVIL, "tuned": EVIL, "place": EVIL}) + "\n")
    event = {"time": "2026-01-01T00:00:00+00:00", "level": "warning", "message": EVIL, "where": EVIL}
    write_text(folder.events, json.dumps(event) + "\n")
    answered = [{"place": EVIL, "prompt": EVIL, "reference": EVIL, "answer": EVIL, "base": EVIL}]
    append_line(folder.metrics, eval_record(31, 0.2, samples=answered, **{EVIL: 0.5}))
    matrix = {"labels": [EVIL, "b"], "confusions": [[1, 2], [3, 4]], "by_label": {EVIL: {"rows": 3, "f1": 0.5}}}
    write_json(folder.evaluation, {"metrics": {EVIL: {"tuned": SHARE, "base": SHARE}}, "rows": 3, **matrix})
    write_json(folder.plan, {"steps": 31, "components": {EVIL: 2**30}, "peak_bytes": 2**30})
    page = run_page(folder.path)
    tags = Tags(page)
    assert len(tags.scripts) == 4
    assert {tag for tag, _ in tags.all} <= {tag for tag, _ in clean} | {"ol", "li", "details", "summary"}
    assert "\x1b" not in page
    shown = json.dumps(data_of(page), ensure_ascii=False)
    assert "<script>alert(1)" in shown, "a chart's text is what it was"


def test_a_run_without_evaluation_has_a_page_too(folder: RunFolder) -> None:
    folder.evaluation.unlink()
    folder.metrics.unlink()
    page = run_page(folder.path)
    assert "Scores" not in page
    assert not data_of(page)["charts"]
    assert "smollm2-135m-instruct" in page


def test_damage_is_told_and_the_rest_is_shown(folder: RunFolder) -> None:
    lines = folder.metrics.read_text().splitlines()
    lines[3], lines[5] = "{torn", json.dumps({"kind": "train", "step": 6, "loss": "low"})
    folder.metrics.write_text("\n".join(lines) + '\n{"kind": "train", "st')
    folder.plan.write_text("{")
    page = run_page(folder.path)
    assert "metrics.jsonl: 2 lines are, the first of them line 4, damaged and left out" in page
    assert "plan.json: damaged" in page
    assert len(data_of(page)["charts"]["loss"]["layer"][0]["data"]["values"]) == 28
    folder.run.unlink()
    with pytest.raises(UserError, match="holds no run"):
        run_page(folder.path)


def test_a_failed_run_says_why_and_a_running_one_is_loaded_again(tmp_path: Path) -> None:
    path = make_run(tmp_path / "failed", [train_record(1, time="2026-01-01T00:00:00+00:00"), train_record(2)])
    error = {"time": "2026-01-01T00:00:01+00:00", "level": "error", "message": "the loss of step 3 is nan", "where": ""}
    append_line(path / "events.jsonl", error)
    page = run_page(path)
    assert "<b>Failed after step 2.</b> the loss of step 3 is nan" in page
    assert [(event.step, event.kind) for event in events_of(read_run(path))] == [(1, "error")], "by its time"
    with RunFolder(path).locked():
        reload = data_of(run_page(path, refresh=30))["reload"]
    assert (reload["seconds"], reload["quiet"]) == (30, 360)


def test_series_are_thinned_out_with_their_ends_and_extremes() -> None:
    points = [(float(n), float(n % 7)) for n in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = thin(points)
    assert len(kept) <= 500
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert points[4321] in kept
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert running_mean([(1, 1.0), (2, 4.0), (3, 1.0)])[1] == (2, 2.0)


def test_a_long_run_has_a_page_of_the_same_size(tmp_path: Path) -> None:
    layers = {"grad_norm_by_layer": [0.1] * 8}
    short, long = (
        make_run(tmp_path / str(count), [train_record(step, 2 + step % 3, **layers) for step in range(1, count + 1)])
        for count in (600, 1500)
    )
    sizes = [len(json.dumps(data_of(run_page(path))["charts"])) for path in (short, long)]
    assert sizes[1] < 1.15 * sizes[0]


def test_the_heat_map_has_a_cell_a_layer_and_column(folder: RunFolder) -> None:
    spec = charts.grad_norm_by_layer(read_run(folder.path))
    assert spec is not None
    cells = spec["layer"][0]["data"]["values"]
    assert {cell["layer"] for cell in cells} == {0, 1, 3}, "nothing is trained in layer 2"
    assert [cell["norm"] for cell in cells[:3]] == [0.1, 0.2, 0.4]
    low, high = charts.heat_ends(spec)
    assert low < high


def test_scores_that_are_not_finite_or_alone_are_not_drawn() -> None:
    endless = {"unit": "", "base": SHARE, "tuned": SHARE | {"high": float("inf")}}
    assert result_charts.comparison(endless) is None
    assert result_charts.comparison({"unit": "share", "tuned": SHARE}) is None
    drawn = result_charts.comparison({"unit": "share", "base": SHARE, "tuned": SHARE})
    assert drawn is not None
    assert drawn["layer"][0]["encoding"]["x"]["scale"] == {"domain": [0, 1]}
    assert verdict_text("equal within 0.095", True) == "equal within 9.5 points"
    assert verdict_text("equal within 0.3", False) == "equal within 0.3"


def test_answers_are_chosen_by_rule() -> None:
    rows = [sample("a", False), sample("b", True), sample("c", False), sample("d", True), sample("e", True)]
    assert [row["place"][0] for row in shown_of(rows)] == ["b", "d", "a"]
    assert [row["place"][0] for row in shown_of(rows[::2][:2])] == ["a"]
    assert shown_of([]) == []


def test_the_libraries_are_those_that_the_notice_names() -> None:
    vendor = resources.files("veneer.report").joinpath("vendor")
    named = re.findall(r"^(\S+\.js) .*\n  SHA-256 (\w+)", vendor.joinpath("NOTICE").read_text(), re.MULTILINE)
    assert len(named) == 3
    for name, sha256 in named:
        content = vendor.joinpath(name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
        assert b"</script" not in content
