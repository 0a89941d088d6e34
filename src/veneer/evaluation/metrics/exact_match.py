"""Exact match: the answer that the model generates is the one that training taught, word for word.

The expected answer is the row's own tokens, decoded as a generated answer is, so that whatever a template
writes into an answer (calls, an empty `<think>` block) is there on both sides. Reasoning does not decide, only what
follows it. Calls in the form of Qwen and Hermes are compared as JSON: spaces and the order of keys do not count.
"""

import json
import re

from veneer.data.conversation import Conversation
from veneer.data.render import Renderer
from veneer.evaluation.decoding import answer_text
from veneer.evaluation.metrics.metric import ScoredRows, ShareRight

EXACT_MATCH = "exact_match"
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def measure(rows: ScoredRows) -> dict[str, ShareRight]:
    """Measure `exact_match`, where any row asks something."""
    right = [is_right(sample.answer, sample.reference) for sample in rows.samples]
    return {EXACT_MATCH: ShareRight(right)} if right else {}


def expected_answer(renderer: Renderer, conversation: Conversation) -> str:
    """Return the answer that the model is to give to a row's last question.

    Raises:
        UserError: The row cannot be rendered.
    """
    return answer_text(renderer.tokenizer, renderer.answer_ids(conversation))


def final_text(answer: str) -> str:
    """Return what follows the reasoning of an answer; all of it where there is none, or nothing follows."""
    return answer.rpartition("</think>")[2].strip() or answer.strip()


def is_right(answer: str, reference: str) -> bool:
    """Return whether an answer is the expected one."""
    return _comparable(final_text(answer)) == _comparable(final_text(reference))


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
