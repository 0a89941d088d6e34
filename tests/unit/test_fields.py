"""Answers that are JSON objects, key by key."""

import json

import pytest

from veneer.evaluation.compare import Evaluation, Score
from veneer.evaluation.metrics import measure
from veneer.evaluation.metrics.json_fields import field_scores, shared_keys
from veneer.evaluation.metrics.metric import Sample, ScoredRows
from veneer.evaluation.metrics.perplexity import Perplexity

REFERENCE = '{"team": "sales", "count": 1, "product": null}'


@pytest.mark.parametrize(
    ("answer", "valid", "right_keys", "record"),
    [
        (REFERENCE, True, {"team", "count", "product"}, True),
        ('{"product":null,"count":1,"team":"sales"}', True, {"team", "count", "product"}, True),
        ('{"team": "sales", "count": 1, "product": "x"}', True, {"team", "count"}, False),
        ('{"team": "sales", "count": true, "product": "null"}', True, {"team"}, False),
        ('{"team": "Sales", "count": 1}', True, {"count"}, False),
        (REFERENCE[:-1] + ', "more": 2}', True, {"team", "count", "product"}, False),
        ("Here it is: " + REFERENCE, False, set(), False),
        ("[" + REFERENCE + "]", False, set(), False),
        (REFERENCE[:-1], False, set(), False),
        ("", False, set(), False),
    ],
)
def test_each_key_of_an_answer_is_judged(answer: str, valid: bool, right_keys: set[str], record: bool) -> None:
    found = field_scores([answer], [REFERENCE])
    assert found["valid_json"] == [valid]
    assert {key for key in ("team", "count", "product") if found[f"field.{key}"] == [True]} == right_keys
    assert found["record"] == [record]


def test_only_references_that_are_objects_of_the_same_keys_have_fields() -> None:
    assert shared_keys([REFERENCE, '{"count": 2, "team": "x", "product": "y"}']) == ("team", "count", "product")
    for other in ("billing", '{"team": "x"}', "[1]", "3", ""):
        assert field_scores([REFERENCE, other], [REFERENCE, other]) == {}
    assert field_scores([], []) == {}


def test_evaluation_has_a_paired_difference_of_each_metric() -> None:
    references = [json.dumps({"team": team, "urgency": "low"}) for team in "abcdefghij"]

    def score(answers: list[str], losses: list[float]) -> Score:
        samples = [Sample("", "", *pair) for pair in zip(references, answers, strict=True)]
        return Score(measure(ScoredRows(samples, losses, [2.0] * 10)), samples, 10)

    guesses = ['{"team": "a", "urgency": "low"}'] * 10
    found = Evaluation(score(guesses, [4.0] * 10), score(references, [1.0] * 10)).as_dict()["metrics"]
    assert list(found) == ["record", "valid_json", "field.team", "field.urgency", "exact_match", "perplexity"]
    assert found["field.team"]["base"]["value"] == pytest.approx(0.1)
    assert found["field.team"]["difference"]["value"] == pytest.approx(0.9)
    assert 0 < found["field.team"]["difference"]["low"] < 0.9
    assert found["field.urgency"]["difference"]["value"] == 0
    assert found["perplexity"]["difference"]["value"] == pytest.approx(2.71828**0.5 - 2.71828**2, rel=1e-4)


def test_a_difference_of_perplexities_pairs_the_rows() -> None:
    hard, easy = [8.0, 1.0, 5.0, 2.0, 9.0, 3.0] * 5, [8.5, 1.5, 5.5, 2.5, 9.5, 3.5] * 5
    base, tuned = Perplexity(hard, [4] * 30), Perplexity(easy, [4] * 30)
    apart = tuned.interval.high - base.interval.low
    found = tuned.difference(base)
    assert 0 < found.low < found.value < found.high < apart
