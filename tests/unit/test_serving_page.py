"""The page asks the models side by side, in a real browser where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.adapters import save_adapter_of
from tests.support.certified import make_base
from tests.support.serving import client_of, few, server_of, service_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_the_page_needs_nothing_of_another_place(tmp_path: Path) -> None:
    make_base(tmp_path / "base", 0)
    with service_of([str(tmp_path / "base")], limits=few()) as service, client_of(service) as client:
        reply = client.get("/")
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"(src|href)\s*=", reply.text)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_models_are_asked_side_by_side_in_a_browser(tmp_path: Path) -> None:
    make_base(tmp_path / "base", 0)
    adapter = save_adapter_of("lora", tmp_path / "base", tmp_path / "tuned")
    with service_of([str(adapter)], limits=few()) as service, server_of(service) as address:
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=30000", "--dump-dom", f"{address}/?ask=the%20cat",
        ]  # fmt: skip
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    card = r'<article data-model="(\w+)" data-done="yes">.*?<p>(.*?)</p><footer[^>]*>(.*?)</footer>'
    cards = re.findall(card, shown, re.DOTALL)
    assert {model for model, _, _ in cards} == {"base", "tuned"}, shown[-2000:]
    assert all(re.match(r"\d+ tokens", footer) for _, _, footer in cards)
