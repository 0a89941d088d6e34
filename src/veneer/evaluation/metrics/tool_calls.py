"""Tool calls: the answer calls the functions that the reference calls, in the same order and with the same arguments.

Calls are read in the form of Qwen and Hermes (`<tool_call>{...}</tool_call>`) and in that of Llama and Mistral (the
answer is a JSON object, or a list of them, with `name` and `arguments` or `parameters`). Text beside calls does not
count. A row whose reference calls nothing is right if the answer calls nothing either.
"""

from typing import Any, NamedTuple

from veneer.evaluation.metrics.exact_match import CALL
from veneer.evaluation.metrics.json_values import json_value, same_json
from veneer.evaluation.metrics.metric import Metric, ScoredRows, ShareRight, needs_answers
from veneer.evaluation.metrics.reasoning import final_text


class ToolCall(NamedTuple):
    """A call: the function's name and its arguments."""

    name: Any
    arguments: Any


def calls_of(answer: str) -> list[ToolCall] | None:
    """Return the calls in an answer; None: it holds one that cannot be read."""
    text = final_text(answer)
    marked = CALL.findall(text)
    values = [json_value(call) for call in marked] if marked else json_value(text.removeprefix("[TOOL_CALLS]"))
    listed = values if isinstance(values, list) else [values]
    found = [_call(value) for value in listed]
    if marked or "<tool_call>" in text:
        return None if not marked or None in found else [call for call in found if call is not None]
    return [call for call in found if call is not None] if None not in found else []


def _call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or "name" not in value:
        return None
    for key in ("arguments", "parameters"):
        if key in value:
            arguments = value[key]
            # Some templates write the arguments as text that is JSON.
            return ToolCall(value["name"], json_value(arguments) if isinstance(arguments, str) else arguments)
    return None


def measure(rows: ScoredRows) -> dict[str, ShareRight]:
    """Measure `tool_calls` (names and arguments) and `tool_names`, where any row asks something."""
    if not rows.samples:
        return {}
    pairs = [(calls_of(sample.answer), calls_of(sample.reference) or []) for sample in rows.samples]
    whole = [given is not None and same_json(given, right) for given, right in pairs]
    names = [given is not None and [c.name for c in given] == [c.name for c in right] for given, right in pairs]
    return {"tool_calls": ShareRight(whole), "tool_names": ShareRight(names)}


def _needs_calls(rows: ScoredRows) -> str:
    if rows.samples and not any(calls_of(sample.reference) for sample in rows.samples):
        return "no right answer calls a tool in a form that is read"
    return needs_answers(rows)


TOOL_CALLS = Metric("tool_calls", measure, _needs_calls)
