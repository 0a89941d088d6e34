"""Tool calls: of two tools the right one, with the right arguments, in a form that the prompt states.

The form and an example of it stand in the prompt and not in the chat template, so that models of all families are asked
the same. A call in the tags of Qwen and Hermes (`<tool_call>`) is taken too.
"""

from veneer.evaluation.suites.suite import Item, Suite, final_text, is_same_json, parse_json


def is_right(item: Item, answer: str) -> bool:
    """Return whether the answer is the expected call and nothing else; the case of text in arguments does not count."""
    text = final_text(answer).removeprefix("<tool_call>").removesuffix("</tool_call>")
    try:
        return is_same_json(_lowered(parse_json(text)), _lowered(item["call"]))
    except ValueError:
        return False


def _lowered(value: object) -> object:
    """Return JSON with its texts, but not its keys, in lower case."""
    if isinstance(value, dict):
        return {key: _lowered(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_lowered(part) for part in value]
    return value.lower() if isinstance(value, str) else value


SUITE = Suite(
    name="tool_form",
    shows="whether the right one of two tools is called with the right arguments, as JSON",
    cannot_show="calls in the chat template's own form, several calls, or use of what a tool answered",
    is_right=is_right,
    max_new_tokens=64,
)
