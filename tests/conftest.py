"""What all tests share: tiny random models made from real configuration classes, with a tiny real tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import some_rows
from tests.support.tiny import FAMILIES, save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives the folder of a tiny random model of a family, made once a session."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str = "llama", chat: bool = True) -> Path:
        if (family, chat) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{'chat' if chat else 'plain'}")
            save_tiny_model(FAMILIES[family], folder, chat)
            made[family, chat] = folder
        return made[family, chat]

    return get


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Rows that a tiny model learns."""
    return some_rows()
