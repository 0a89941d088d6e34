"""Rows on disk and as prepared data, for the tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tiny import tiny_tokenizer
from veneer.config import Data, UserError
from veneer.data.batch import Example
from veneer.data.conversation import Conversation, Message
from veneer.data.pipeline import Prepared, prepare
from veneer.data.render import Renderer

CHAT = [
    ("user", "what does the cat say"),
    ("assistant", "the cat"),
    ("user", "please"),
    ("assistant", "the owl"),
]


GOOD = {"prompt": "the cat", "completion": "the dog"}
WORDS = ["cat", "dog", "owl", "hen", "team", "route", "please", "message", "right", "says"]


def conversation(turns: list[tuple[str, str]]) -> Conversation:
    """Turns of (role, text) as a conversation."""
    return Conversation(tuple(Message(role, text) for role, text in turns), "rows.jsonl:1")


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Turns of (role, text) as OpenAI writes them."""
    return [{"role": role, "content": text} for role, text in pairs]


def distinct(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows that are not nearly equal."""
    rng = np.random.default_rng(start)
    return [
        {"prompt": f"{n} " + " ".join(rng.choice(WORDS, 12)), "completion": f"answer {n}"}
        for n in range(start, start + count)
    ]


def jsonl(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    """A file of rows; text is written as it is."""
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def renderer(tokenizer: Any = None, **settings: Any) -> Renderer:
    """A renderer on the tiny tokenizer."""
    return Renderer(tokenizer or tiny_tokenizer(), Data.model_validate({"train": "-"} | settings))


def prepared(path: str | list[str], chat: bool = True, **settings: Any) -> Prepared:
    """A file's rows through the tiny tokenizer, nothing held out."""
    data = Data.model_validate({"train": path, "validation": 0} | settings)
    return prepare(data, Renderer(tiny_tokenizer(chat), data), seed=0)


def refused(path: str | list[str], **settings: Any) -> str:
    """What the user is told about data that cannot be used."""
    with pytest.raises(UserError) as caught:
        prepared(path, **settings)
    return str(caught.value)


def text_of(example: Example, tokenizer: Any = None) -> str:
    """All tokens of an example."""
    return str((tokenizer or tiny_tokenizer()).decode(example.ids))


def trained_text(example: Example, tokenizer: Any = None) -> str:
    """The trained tokens of an example."""
    return str((tokenizer or tiny_tokenizer()).decode(example.ids[example.weights > 0]))
