"""The page of a run in a real browser: all charts are drawn, nothing is wider than a phone, and nothing is fetched.

`make test-browser`; it needs Debian's or any other Chromium, and the client Playwright from the extra `dev`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_folders import append_line, eval_record, make_run, train_record
from veneer.config import RunFolder
from veneer.report.run_page import run_page, write_run_page
from veneer.report.runs_page import runs_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> a_long_word_" + "x" * 200
MEASURE = """[...document.querySelectorAll('.chart')].map((one) => [one.id, one.clientWidth,
    one.querySelectorAll('svg path, svg rect, svg text').length, one.getBoundingClientRect().right])"""
SHARE = {"value": 0.7, "low": 0.6, "high": 0.8}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright is installed (the extra dev)")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with something of everything that a page shows, and text that would break it."""
    pairs = {f"{of}/{which}": 1.0 for of in ("rewards", "logps") for which in ("chosen", "rejected")}
    pairs |= {"rewards/margins": 0.5, "rewards/accuracies": 0.9}
    layers = {"grad_norm_by_layer": [0.1 * (1 + layer) for layer in range(12)]}
    records: list[dict[str, Any]] = []
    for step in range(1, 41):
        records.append(train_record(step, 2 + 3 / step, **pairs, **layers, time=f"2026-01-01T00:00:{step:02d}+00:00"))
        if step % 10 == 0:
            intervals = {key: [0.2, 1.4] for key in (*pairs, "loss")}
            samples = [{"place": "rows.jsonl:1", "prompt": EVIL, "reference": "b", "answer": EVIL, "base": EVIL}]
            more = {"accuracy": 0.8, "macro_f1": 0.7, "intervals": intervals, "samples": samples}
            records.append(eval_record(step, 2 + 1 / step, **pairs, **more))
    path = make_run(tmp_path_factory.mktemp("runs") / "everything", records, is_finished=True)
    components = {"4-bit weights": 2**30, EVIL: 2**29}
    plan = {"steps": 40, "tokens_per_second": 250.0, "step_seconds": {"low": 0.3, "likely": 0.4, "high": 0.6}}
    plan |= {"rows": {"tokens": 100}, "components": components, "peak_bytes": 2**30, "budget_bytes": 2**34}
    (path / "plan.json").write_text(json.dumps(plan))
    event = {"time": "2026-01-01T00:00:07+00:00", "level": "warning", "message": EVIL, "where": ""}
    append_line(path / "events.jsonl", event)
    append_line(path / "events.jsonl", event | {"message": "out of memory in step 9: made again"})
    labels = {"labels": ["a", EVIL], "confusions": [[3, 1], [0, 4]], "by_label": {"a": {"rows": 4, "f1": 0.9}}}
    metrics = {"accuracy": {"base": SHARE, "tuned": SHARE}, EVIL: {"base": SHARE, "tuned": SHARE}}
    (path / "evaluation.json").write_text(json.dumps({"metrics": metrics, "rows": 8, **labels}))
    histogram = [{"from": 8 * n, "to": 8 * n + 8, "rows": n} for n in range(16)]
    (path / "ledger.json").write_text(json.dumps({"lengths": {"histogram": histogram}, "warnings": [EVIL]}))
    return path


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["run", "runs"])
def test_it_is_drawn(kind: str, scheme: str, width: int, browser: Any, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(run_page(run) if kind == "run" else runs_page([run, make_run(tmp_path / EVIL[-100:], [])]))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    assert said == []
    assert asked == [file.as_uri()], "nothing is fetched"
    found = page.evaluate(MEASURE)
    assert len(found) == (17 if kind == "run" else 2)
    for name, wide, marks, right in found:
        assert wide > 150, name
        assert marks > 5, f"{name} is empty"
        assert right <= width, f"{name} is wider than the page"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    inks = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (sum(map(int, inks[0][4:-1].split(", "))) > 380) == (scheme == "light")
    page.close()


def test_numbers_are_shown_under_the_pointer(browser: Any, run: Path, tmp_path: Path) -> None:
    file = write_run_page(RunFolder(run))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    page.locator("#loss svg").hover(position={"x": 400, "y": 100})
    told = page.locator("#vg-tooltip-element.visible").inner_text(timeout=5000)
    assert "step" in told
    assert "loss" in told
    page.close()


def test_a_page_whose_run_goes_on_is_loaded_again_where_its_reader_is(browser: Any, run: Path) -> None:
    with RunFolder(run).locked():
        file = write_run_page(RunFolder(run), refresh=3)
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        with page.expect_navigation(timeout=30_000):
            page.evaluate("window.scrollTo(0, 900)")
        page.wait_for_selector("html[data-drawn]", state="attached")
        assert abs(page.evaluate("window.scrollY") - 900) < 40, "but for a line that was wrapped"
    write_run_page(RunFolder(run))
    page.goto(file.as_uri())
    assert page.locator("#live").count() == 0, "it is over"
    page.close()


def test_it_prints_in_ink_on_paper(browser: Any, run: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(write_run_page(RunFolder(run)).as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
