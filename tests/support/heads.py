"""Rows and runs of token classification and of embeddings, for the tiny bases of `tests.support.classifiers`."""

import random
from pathlib import Path
from typing import Any

import veneer
from tests.support.classifiers import BAD, GOOD, classify

THINGS = ("film", "book", "meal")


def some_tagged(count: int = 96) -> list[dict[str, Any]]:
    """Rows of uneven length, whose tags follow from the words: things, and what is said of them in one word or two."""
    draw = random.Random(0)
    rows = []
    for n in range(count):
        very, tail = n % 2, n % 4
        words = ["the", draw.choice(THINGS), "was", *["very"] * very, draw.choice(GOOD + BAD), *["and", "so"] * tail]
        tags = ["O", "B-THING", "O", *["B-SAID", "I-SAID"][: 1 + very], *["O", "O"] * tail]
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def some_texts_with_positives(count: int = 48, negatives: bool = False) -> list[dict[str, Any]]:
    """Rows whose texts belong together if they speak of one thing in one way; 18 pairs in all."""
    rows = []
    for n in range(count):
        thing, said = THINGS[n % 3], (GOOD + BAD)[n // 3 % 6]
        anchor = f"the {thing} was {said}" + " and so" * (n // 18)
        row: dict[str, Any] = {"anchor": anchor, "positive": f"{said} {thing}"}
        if negatives and n % 2:
            row["negative"] = f"{said} {THINGS[(n + 1) % 3]}"
        rows.append(row)
    return rows


def tag(base: Path, rows: list[dict[str, Any]], folder: Path, **sections: Any) -> veneer.Run:
    """A run of a few steps that gives words tags; `sections` override its settings."""
    return classify(base, rows, folder, **_for("token-classification", sections))


def embed(base: Path, rows: list[dict[str, Any]], folder: Path, **sections: Any) -> veneer.Run:
    """A run of a few steps that embeds texts; `sections` override its settings."""
    return classify(base, rows, folder, **_for("embedding", sections))


def _for(task: str, sections: dict[str, Any]) -> dict[str, Any]:
    return sections | {"model": {"task": task} | sections.get("model", {})}
