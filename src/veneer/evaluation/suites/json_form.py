"""JSON: a short fact or list, written as JSON with the keys and types that the prompt names.

The whole answer must be the JSON, alone or within one code fence, since a program that reads it would fail on a word
around it. Values stand in the prompt; keys, types and values must all be right.
"""

from veneer.evaluation.suites.suite import Item, Suite, is_same_json, parse_json


def is_right(item: Item, answer: str) -> bool:
    """Return whether the answer is the expected JSON and nothing else."""
    try:
        return is_same_json(parse_json(answer), item["expected"])
    except ValueError:
        return False


SUITE = Suite(
    name="json_form",
    shows="whether small objects and lists are written as valid JSON with the keys, types and values asked for",
    cannot_show="long or deeply nested JSON, or extraction that needs understanding",
    is_right=is_right,
    max_new_tokens=64,
)
