"""All code of docs/python.md runs, in one session on a tiny model; examples of the public functions are lines of it."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

import veneer
from tests.support.certified import make_base

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BASE = '"smollm2-135m-instruct"'
FUNCTIONS = ("certify", "evaluate", "export", "generate", "load", "merge", "plan", "prepare", "push", "train")


def code() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    return "\n".join(blocks)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base", 0)
    script = tmp_path / "page.py"
    script.write_text(code().replace(BASE, repr(str(tmp_path / "base"))))
    made = runpy.run_path(str(script))
    assert made["prepared"].ledger["rows"]["used"] == made["prepared"].ledger["rows"]["training"] + 8
    assert made["planned"]["fits"] is True
    assert (made["trained"].steps, len(made["losses"])) == (20, 20)
    assert made["losses"][-1] < made["losses"][0]
    assert "held-out loss after step 20" in capsys.readouterr().out
    assert made["evaluated"].is_record
    assert set(made["answers"][0]) == {"prompt", "answer", "base"}
    assert made["certificate"].passed
    assert {"adapter_model.safetensors", "passport.json"} <= set(made["pushed"]["files"])
    assert made["pushed"]["sent"] is False


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_example_is_code_of_the_page(name: str) -> None:
    text = inspect.getdoc(getattr(veneer, name)) or ""
    match = re.search(r"^Example:\n((?: {4}.*\n|\n)+)", text, re.MULTILINE)
    assert match is not None, "its docstring has no example"
    page = code().splitlines()
    missing = [line for line in inspect.cleandoc(match[1]).splitlines() if line and line not in page]
    assert not missing
