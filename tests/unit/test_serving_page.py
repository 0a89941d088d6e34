"""The page asks the models side by side, in a real browser where there is one."""

import re
from pathlib import Path

import pytest

from tests.support.adapters import save_adapter_of
from tests.support.browser import CHROMIUM, in_page
from tests.support.certified import make_base
from tests.support.serving import few, server_of, service_of

LOADED = "document.querySelectorAll('#models input:checked').length === 2"
ASK = "document.getElementById('question').value = 'the cat'; document.getElementById('ask').click(); true"
ANSWERED = """(() => {
  const cards = [...document.querySelectorAll('article')];
  const isDone = cards.length === 2 && cards.every((card) => card.dataset.done);
  return isDone && cards.map((card) => [...card.children].map((child) => child.textContent));
})()"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_models_are_asked_side_by_side_in_a_browser(tmp_path: Path) -> None:
    make_base(tmp_path / "base", 0)
    adapter = save_adapter_of("lora", tmp_path / "base", tmp_path / "tuned")
    with service_of([str(adapter)], limits=few()) as service, server_of(service) as address:
        cards = in_page(address, tmp_path / "profile", [LOADED, ASK, ANSWERED])[-1]
    assert [title for title, _, _ in cards] == ["base", "tuned"]
    assert all(re.match(r"16 tokens, [\d.]+ s", footer) for _, _, footer in cards), cards
    assert cards[0][1] != cards[1][1]
    html = (Path("src/veneer/serving/page.html")).read_text()
    assert not re.search(r"(src|href)\s*=", html), "it needs nothing of another place"
