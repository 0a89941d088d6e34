"""Numbers of tiny runs are what they were: see tests/support/pinned.py."""

import json
from pathlib import Path

import pytest
import torch

from tests.support import pinned

PINNED = json.loads(pinned.FILE.read_text())


@pytest.mark.parametrize(("family", "engine", "packing", "dropout"), pinned.CASES)
def test_a_run_comes_to_the_same_numbers(
    family: str, engine: str, packing: bool, dropout: float, tmp_path: Path
) -> None:
    expected = PINNED["runs"][pinned.name_of(family, engine, packing, dropout)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = pinned.measure(family, engine, packing, dropout, tmp_path)
    finally:
        torch.set_num_threads(threads)
    # Another CPU adds in another order: 1e-7 a sum, times the 1e2 that six steps of Adam made of it at most when tried.
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["gradient_norms"] == pytest.approx(expected["gradient_norms"], rel=1e-3)
    if PINNED["machine"] == pinned.machine():
        assert found["adapter_sha256"] == expected["adapter_sha256"]


def test_every_case_is_pinned() -> None:
    assert set(PINNED["runs"]) == {pinned.name_of(*case) for case in pinned.CASES}
