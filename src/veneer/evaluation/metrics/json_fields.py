"""JSON fields: answers that are JSON objects are judged key by key.

An answer counts as an object only as a whole: text around it, or a list, is not one, since a program that reads it
would fail. The order of keys and white space do not count; a missing key is wrong.
"""

from collections.abc import Sequence

from veneer.evaluation.metrics.json_values import json_object, same_json
from veneer.evaluation.metrics.metric import Metric, ScoredRows, ShareRight, needs_answers
from veneer.evaluation.metrics.reasoning import final_text

VALID = "valid_json"
RECORD = "record"
FIELD = "field."  # before each key's name, so that no key is taken for another metric


def measure(rows: ScoredRows) -> dict[str, ShareRight]:
    """Measure `record`, `valid_json` and each `field.KEY`, where all references are JSON objects of the same keys."""
    answers, references = [sample.answer for sample in rows.samples], [sample.reference for sample in rows.samples]
    return {name: ShareRight(right) for name, right in field_scores(answers, references).items()}


def shared_keys(references: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of references that are JSON objects of the same keys, in the first one's order; else none."""
    objects = [json_object(final_text(text)) for text in references]
    if not objects or objects[0] is None:
        return ()
    keys = set(objects[0])
    return tuple(objects[0]) if all(found is not None and set(found) == keys for found in objects) else ()


def field_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[bool]]:
    """Judge rows by each key; there is none where the references are not JSON objects of the same keys.

    Args:
        answers: One a row.
        references: The right answers in the same order.

    Returns:
        `record`: all values are right, and there are no others; `valid_json`: the answer is a JSON object;
        `field.KEY`: its value of the key is right.
    """
    keys = shared_keys(references)
    if not keys:
        return {}
    given = [json_object(final_text(text)) for text in answers]
    right = [json_object(final_text(text)) or {} for text in references]
    pairs = list(zip(given, right, strict=True))
    found = {
        RECORD: [answer is not None and same_json(answer, reference) for answer, reference in pairs],
        VALID: [answer is not None for answer in given],
    }
    for key in keys:
        found[FIELD + key] = [
            answer is not None and key in answer and same_json(answer[key], reference[key])
            for answer, reference in pairs
        ]
    return found


def _needs_keys(rows: ScoredRows) -> str:
    if rows.samples and not shared_keys([sample.reference for sample in rows.samples]):
        return "the right answers are not all JSON objects of the same keys"
    return needs_answers(rows)


JSON_FIELDS = Metric("json_fields", measure, _needs_keys)
