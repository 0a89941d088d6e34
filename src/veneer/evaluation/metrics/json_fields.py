"""JSON fields: answers that are JSON objects are judged key by key.

An answer counts as an object only as a whole: text around it, or a list, is not one, since a program that reads it
would fail. The order of keys and white space do not count; a missing key is wrong.
"""

import json
from collections.abc import Sequence
from typing import Any

from veneer.evaluation.metrics.exact_match import final_text, is_right
from veneer.evaluation.metrics.metric import ScoredRows, ShareRight

VALID = "valid_json"
RECORD = "record"
FIELD = "field."  # before each key's name, so that no key is taken for another metric


def measure(rows: ScoredRows) -> dict[str, ShareRight]:
    """Measure `valid_json`, each `field.KEY` and `record`, where all references are JSON objects of the same keys."""
    answers, references = [sample.answer for sample in rows.samples], [sample.reference for sample in rows.samples]
    return {name: ShareRight(right) for name, right in field_scores(answers, references).items()}


def json_object(text: str) -> dict[str, Any] | None:
    """Parse a text that is a JSON object; None: it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def shared_keys(references: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of references that are JSON objects of the same keys, in the first one's order; else none."""
    objects = [json_object(text) for text in references]
    if not objects or objects[0] is None:
        return ()
    keys = set(objects[0])
    return tuple(objects[0]) if all(found is not None and set(found) == keys for found in objects) else ()


def field_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[bool]]:
    """Judge rows by each metric; none applies where the references are not JSON objects of the same keys.

    Args:
        answers: One a row.
        references: The right answers in the same order.

    Returns:
        `valid_json`: the answer is a JSON object; `field.KEY`: its value of the key is right; `record`: all of them
        are, and there are no others.
    """
    answers, references = [final_text(text) for text in answers], [final_text(text) for text in references]
    keys = shared_keys(references)
    if not keys:
        return {}
    given = [json_object(text) for text in answers]
    right = [json_object(text) or {} for text in references]
    found = {VALID: [answer is not None for answer in given]}
    for key in keys:
        found[FIELD + key] = [
            answer is not None and key in answer and _same(answer[key], reference[key])
            for answer, reference in zip(given, right, strict=True)
        ]
    found[RECORD] = [
        answer is not None and _same(answer, reference) for answer, reference in zip(given, right, strict=True)
    ]
    return found


def right_rows(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Judge rows by the rule that decides: the whole record of JSON answers, else the text."""
    exact = [is_right(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    return field_scores(answers, references).get(RECORD, exact)


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are equal as JSON: true is not 1, and the order of keys does not count."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
