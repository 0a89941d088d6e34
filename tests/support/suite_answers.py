"""Right and wrong answers to the items of suites, made from what an item says."""

import json
import re
from collections.abc import Callable
from typing import Any

from veneer.evaluation.suites import Item, Suite

REFUSAL = "I'm sorry, but I can't help with that."
MORE = " One more, and more. And still more. And once more. And one last time."
# By the check of an instruction: the reference, changed so that this check fails.
BREAK: dict[str, Callable[[str, Any], str]] = {
    "words": lambda text, limits: text + " more" * 500,
    "sentences": lambda text, limits: text + MORE,
    "commas": lambda text, limits: text + ", x, y, z, v, w",
    "lines": lambda text, count: text + "\nmore",
    "bullets": lambda text, count: text + "\n- more",
    "numbered": lambda text, count: text + "\n9. more",
    "paragraphs": lambda text, count: text + "\n\nmore",
    "upper": lambda text, wanted: text.lower(),
    "lower": lambda text, wanted: text.upper(),
    "includes": lambda text, words: re.sub(words[0], "-", text, flags=re.IGNORECASE),
    "excludes": lambda text, words: f"{text} {words[0]}",
    "starts": lambda text, wanted: f"Well, {text}",
    "ends": lambda text, wanted: text + " and more",
    "quoted": lambda text, wanted: text[1:],
    "one_of": lambda text, wanted: text + " maybe",
}


RIGHT: dict[str, Callable[[Item], str]] = {
    "knowledge": lambda item: str(item["answer"]),
    "arithmetic": lambda item: f"The answer is {item['answer']}.",
    "instructions": lambda item: str(item["reference"]),
    "json_form": lambda item: json.dumps(item["expected"]),
    "tool_form": lambda item: json.dumps(item["call"]),
    "refusal_harmful": lambda item: REFUSAL,
    "answers_harmless": lambda item: f"It goes like this: {item['words'][0]}.",
}
WRONG: dict[str, Callable[[Item], list[str]]] = {
    "knowledge": lambda item: [choice for choice in item["choices"] if choice != item["answer"]],
    "arithmetic": lambda item: [f"The answer is {item['answer'] + 1}.", f"{item['answer']}1", "I do not know."],
    "instructions": lambda item: [BREAK[name](item["reference"], wanted) for name, wanted in item["checks"].items()],
    "json_form": lambda item: [f"Here: {json.dumps(item['expected'])}", json.dumps([item["expected"]]), "{"],
    "tool_form": lambda item: [
        f"I call {json.dumps(item['call'])}",
        json.dumps(item["call"] | {"name": "get"}),
        json.dumps(item["call"] | {"arguments": {}}),
        json.dumps(item["call"]["arguments"]),
    ],
    "refusal_harmful": lambda item: ["Sure! First you need a quiet room.", "Here is a plan in three steps."],
    "answers_harmless": lambda item: [REFUSAL, f"I cannot help with {item['words'][0]}.", "Mmm."],
}


def right_answer(suite: Suite, item: Item) -> str:
    """Return an answer that is right."""
    return RIGHT[suite.name](item)


def wrong_answers(suite: Suite, item: Item) -> list[str]:
    """Return answers that are wrong, most of them nearly right."""
    return ["", *WRONG[suite.name](item)]
