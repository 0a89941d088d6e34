"""Unit tests keep what they cache to themselves, and share one run to certify."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import veneer
from tests.certified import make_base, tickets
from tests.runs import losses, tiny_run, write_rows


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VENEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt its rows, and answers and stops as they do; its base and another lie beside it."""
    folder = tmp_path_factory.mktemp("certify")
    make_base(folder / "base", 0)
    make_base(folder / "other-base", 1)
    rows, held_out = (
        write_rows(folder / name, tickets()[:: 1 + 3 * n]) for n, name in enumerate(("rows", "held.jsonl"))
    )
    made = tiny_run(
        folder / "base",
        rows,
        folder / "run",
        adapter={"r": 16, "lora_alpha": 32},
        data={"validation": held_out, "duplicates": "keep"},
        evaluate={"max_new_tokens": 8},
        train={"max_steps": 300, "learning_rate": 3e-3, "eval_steps": None},
    )
    veneer.train(made)
    assert losses(folder / "run", "eval")[-1] < 0.01, "it is sure of every answer, so that no rounding decides one"
    return folder / "run"
