"""Exact match: the answer that the model generates is the one that training taught, word for word.

The expected answer is the row's own tokens, decoded as a generated answer is (`expected_answer` in decoding.py), so
that whatever a template writes into an answer (calls, an empty `<think>` block) is there on both sides. Reasoning does
not decide, only what follows it. Calls in the form of Qwen and Hermes are compared as JSON: spaces and the order of
keys do not count. With `evaluate.extract` only what its pattern finds is compared.
"""

import json
import re

from veneer.config import Evaluate
from veneer.evaluation.metrics.extract import extracted, needs_match
from veneer.evaluation.metrics.metric import DEFAULTS, Metric, ScoredRows, ShareRight

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def measure(rows: ScoredRows) -> dict[str, ShareRight]:
    """Measure `exact_match`, where any row asks something."""
    right = [is_right(sample.answer, sample.reference, rows.settings) for sample in rows.samples]
    return {"exact_match": ShareRight(right)} if right else {}


def is_right(answer: str, reference: str, settings: Evaluate = DEFAULTS) -> bool:
    """Return whether an answer, or what `evaluate.extract` finds in it, is the expected one."""
    given, right = extracted(answer, settings), extracted(reference, settings)
    return given is not None and right is not None and _comparable(given) == _comparable(right)


def _comparable(text: str) -> str | tuple[str, ...]:
    """Return the text; where it holds calls, the text beside them and each call as JSON of one form."""
    found = CALL.findall(text)
    if not found:
        return text
    try:
        calls = [json.dumps(json.loads(call), sort_keys=True) for call in found]
    except (ValueError, RecursionError):
        return text
    return ("".join(CALL.sub("", text).split()), *calls)


EXACT_MATCH = Metric("exact_match", measure, needs_match)
