"""The page that a run writes while it trains: seldom, beside the steps, and never at the cost of the run."""

from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.support.notices import notified
from tests.support.run_folders import make_run, train_record
from veneer.api import live_page
from veneer.api.live_page import LivePage
from veneer.config import RunFolder
from veneer.report.run_page import write_run_page


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_page, "FIRST_SECONDS", 0.0)


def test_pages_are_few_and_the_last_one_has_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(tmp_path / "run", [train_record(1)])
    waits: list[float] = []

    def counted(folder: RunFolder, refresh: float) -> None:
        waits.append(refresh)
        write_run_page(folder, refresh)

    monkeypatch.setattr(live_page, "write_run_page", counted)
    with LivePage(RunFolder(path)) as page, RunFolder(path).locked():
        for step in range(200):
            page(train_record(step))
        assert len(waits) <= 1
    assert len(waits) == 2
    assert '"reload":null' in (path / "report.html").read_text(), "nobody trains it any more"


def test_a_page_that_is_slow_holds_no_step_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = Event()
    monkeypatch.setattr(live_page, "write_run_page", lambda *given: go_on.wait(60))
    with LivePage(RunFolder(make_run(tmp_path / "run"))) as page:
        page(train_record(1))
        page(train_record(2))  # comes back while the page is still being written
        go_on.set()


def test_an_error_is_told_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*given: Any) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(live_page, "write_run_page", breaks)
    path = make_run(tmp_path / "run")
    with notified("report.html could not be written") as said, LivePage(RunFolder(path)) as page:
        page(train_record(1))
    assert len(said) == 1
    assert "odd" in (path / "events.jsonl").read_text()
    with LivePage(RunFolder(tmp_path / "refused")):
        pass  # nothing was trained, so nothing is written
    assert not (tmp_path / "refused").exists()
