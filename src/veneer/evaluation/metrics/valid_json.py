"""Valid JSON: the answer is a JSON object and nothing else; or a list, where the reference is one."""

from veneer.evaluation.metrics.json_values import json_value
from veneer.evaluation.metrics.metric import Metric, ScoredRows, ShareRight
from veneer.evaluation.metrics.reasoning import final_text


def measure(rows: ScoredRows) -> dict[str, ShareRight]:
    """Measure `valid_json`, where any row asks something."""
    right = [
        isinstance(json_value(final_text(sample.answer)), list if wants_list(sample.reference) else dict)
        for sample in rows.samples
    ]
    return {"valid_json": ShareRight(right)} if right else {}


def wants_list(reference: str) -> bool:
    """Return whether a reference is a JSON list."""
    return isinstance(json_value(final_text(reference)), list)


VALID_JSON = Metric("valid_json", measure)
