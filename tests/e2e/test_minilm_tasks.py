"""The encoder from PyPI learns to find entities and to match questions with answers, in a minute each."""

import random
from pathlib import Path
from typing import Any

import pytest

import veneer
from veneer.config import Run

pytestmark = pytest.mark.e2e
NAMES = {
    "PER": ["Anna Smith", "Tomas Novak", "Maria", "Lena Keller", "Paul Haas", "Nora", "Hugo Rossi", "Ivan Petrov"],
    "LOC": ["Paris", "New York", "Madrid", "Oslo", "Cape Town", "Vienna", "Lisbon", "San Diego"],
    "ORG": ["Siemens", "Red Cross", "Toyota", "World Bank", "Nestle", "Acme Corp", "Airbus", "Unilever"],
}
SENTENCES = [
    "PER from ORG flew to LOC on Monday .",
    "ORG opened an office in LOC .",
    "Yesterday PER met PER in LOC .",
    "The weather was fine and nobody complained .",
    "PER says that ORG will hire people in LOC .",
    "Prices rose in LOC and LOC .",
]
# Answers share hardly a word with their questions, so that words alone do not match them.
ANSWERS = {
    "Can I send the {} back if I do not like it?": "Return policy R: unused goods, 30 days. Group: {}.",
    "My {} broke after two months, who pays?": "Warranty W: two years, faults of material. Group: {}.",
    "When will the {} get to me?": "Delivery D: three to five working days. Group: {}.",
    "Is the {} cheaper if we order ten?": "Bulk B: 12 percent off from ten pieces. Group: {}.",
}
THINGS = [f"{size} {thing}" for size in ("small", "large", "old") for thing in ("kettle", "lamp", "bike", "tent")]
GROUPS = {thing: f"{chr(65 + n)}{n * 7 % 10}" for n, thing in enumerate(THINGS)}  # unknown to the base


def some_sentences(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        tokens, tags = [], []
        for word in draw.choice(SENTENCES).split():
            words = draw.choice(NAMES[word]).split() if word in NAMES else [word]
            tokens += words
            tags += [f"B-{word}", *[f"I-{word}"] * (len(words) - 1)] if word in NAMES else ["O"]
        rows.append({"tokens": tokens, "ner_tags": tags})
    return rows


def run_of(task: str, rows: list[dict[str, Any]], folder: Path, **train: Any) -> Run:
    return Run(
        model={"base": "all-minilm-l6-v2", "task": task},
        data={"train": rows, "validation": 0.25, "max_length": 128},
        train={"output_dir": folder / "run", "eval_steps": None, "per_device_train_batch_size": 16, **train},
    )


def test_entities_are_found_in_a_text(tmp_path: Path) -> None:
    rows = some_sentences(300)
    veneer.train(run_of("token-classification", rows, tmp_path, learning_rate=2e-3, max_steps=30))
    f1 = veneer.evaluate_classifier(tmp_path / "run").as_dict()["metrics"]["entity_f1"]
    assert f1["tuned"]["low"] > 0.8
    (found,) = veneer.predict(tmp_path / "run", [{"text": "Nora of Airbus moved from Oslo to Cape Town."}])
    assert ("PER", "Nora", 0, 4) in [(entity.type, entity.text, entity.start, entity.end) for entity in found.entities]
    assert ("LOC", "Oslo") in [(entity.type, entity.text) for entity in found.entities]


def test_questions_find_their_answers_better_than_with_the_base(tmp_path: Path) -> None:
    greetings = ("", "Hello, ", "A question: ", "Hi there, ")
    rows = [
        {"question": greeting + question.format(thing), "answer": answer.format(GROUPS[thing])}
        for greeting in greetings
        for question, answer in ANSWERS.items()
        for thing in THINGS
    ]
    train = {"learning_rate": 2e-3, "max_steps": 40, "gradient_accumulation_steps": 2}
    veneer.train(run_of("embedding", rows, tmp_path, **train))
    found = veneer.evaluate_classifier(tmp_path / "run").as_dict()
    assert found["metrics"]["mrr"]["difference"]["low"] > 0.1
