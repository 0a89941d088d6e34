"""Gates: what is a condition, what holds only if it is shown, and how `veneer evaluate --gate` ends."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.runs import tiny_run, write_rows
from veneer.config import UserError
from veneer.evaluation.gate import (
    Bound,
    Measured,
    bounds_of,
    check_gate,
    parse_gate,
    require_names,
    rows_needed,
)
from veneer.training.intervals import Interval, proportion

Call = Callable[..., tuple[int, str, str]]
MEASURED = {
    "exact_match": Measured(Interval(0.85, 0.8, 0.9), 200, "share"),
    "perplexity": Measured(Interval(3.0, 2.5, 3.5), 200),
    "field.unit price": Measured(Interval(1.0, 0.98, 1.0), 200, "share"),
    "difference(exact_match)": Measured(Interval(0.05, -0.01, 0.11), 200, "share"),
}


def holds(gate: str) -> bool:
    return all(check.passed for check in check_gate(parse_gate(gate), MEASURED))


@pytest.mark.parametrize(
    ("gate", "is_shown"),
    [
        ("exact_match >= 0.8", True),
        ("exact_match > 80%", False),  # the interval begins at 0.8
        ("exact_match >= 0.85", False),  # the value does, the interval does not
        ("exact_match <= .9", True),
        ("0.8 <= exact_match", True),
        ("0.9 < exact_match", False),
        ("perplexity < 4 and exact_match >= 0.8", True),
        ("perplexity < 3.2 and exact_match >= 0.8", False),
        ("perplexity < 3.2 or exact_match >= 0.8", True),
        ("perplexity<3.2 or exact_match>=0.8 and perplexity>1", True),  # `and` binds first
        ("(perplexity < 3.2 or exact_match >= 0.8) and perplexity > 3", False),
        ("not perplexity > 4", True),
        ("not perplexity > 3.2", False),  # not shown either way
        ("not not exact_match >= 0.8", True),
        ("not (exact_match < 0.7 or perplexity >= 4)", True),
        ("not (exact_match < 0.7 and perplexity >= 3)", True),
        ("difference(exact_match) > -5e-2", True),
        ("difference(exact_match) >= 0", False),
        ("difference('exact_match') <= +0.2", True),
        ('"field.unit price" >= 0.95', True),
    ],
)
def test_a_bound_holds_only_if_the_interval_shows_it(gate: str, is_shown: bool) -> None:
    assert holds(gate) is is_shown


def test_a_check_names_the_bound_the_end_and_the_rows_that_would_settle_it() -> None:
    passed, open_, refused = check_gate(
        parse_gate("exact_match >= 0.8 and exact_match >= 0.82 and perplexity <= 2"), MEASURED
    )
    assert (passed.passed, passed.value, passed.limit, passed.detail) == (True, 0.8, 0.8, "")
    assert (open_.id, open_.passed, open_.value, open_.bound) == ("exact_match >= 0.82", False, 0.8, "at least")
    assert "85.0% (80.0% to 90.0%) on 200 rows: not shown; about 630 rows like these would show it" in open_.detail
    assert "shown not to hold" in refused.detail
    (either,) = check_gate(parse_gate("exact_match > 0.86 or perplexity < 3"), MEASURED)
    assert either.id == "(exact_match > 0.86 or perplexity < 3)"
    assert "show that it does not hold" in either.detail
    assert "too near to the bound" in either.detail


def test_the_rows_it_names_settle_it() -> None:
    bound = Bound("exact_match", ">=", 0.95, 1)
    found = rows_needed(bound, Measured(proportion(60, 60), 60, "share"))
    assert found is not None
    assert proportion(found, found).low >= 0.95 > proportion(found - 1, found - 1).low
    assert rows_needed(bound, Measured(Interval(0.95, 0.9, 0.97), 60, "share")) is None
    # Of a mean, an interval half as wide needs four times the rows.
    assert rows_needed(Bound("loss", "<=", 1.0, 1), Measured(Interval(0.5, 0.0, 1.5), 50)) == 200


@pytest.mark.parametrize(
    ("gate", "position", "message"),
    [
        ("", 1, "the end stands where a name should"),
        ("exact_match", 12, "the end stands where an operator should"),
        ("exact_match >=", 15, "the end stands where a number should"),
        ("exact_match >= high", 16, "`high` stands where a number should"),
        ("exact_match = 1", 13, "an interval never shows equality"),
        ("exact_match == 1", 13, "an interval never shows equality"),
        ("exact_match >= 0.8 perplexity < 2", 20, "one word too many"),
        ("exact_match >= 0.8 and", 23, "the end stands where a name should"),
        ("(exact_match >= 0.8", 20, "where `)` should"),
        ("exact_match >= 0.8)", 19, "one word too many"),
        ("and >= 1", 1, "`and` stands where a name should"),
        ("difference(exact_match >= 1", 24, "where `)` should"),
        ("exact_match >= 1e999", 16, "no finite number"),
        ("exact_match >= 0.8; import os", 19, "`;` means nothing here"),
        ("__import__('os').system('true') >= 1", 11, "stands where an operator should"),
        ("exact_match >= 0x10", 16, "means nothing here"),
        ("(" * 100 + "a > 1" + ")" * 100, 21, "within each other"),
        ("not " * 100 + "a > 1", 81, "within each other"),
    ],
)
def test_a_gate_that_is_no_condition_is_refused_with_its_position(gate: str, position: int, message: str) -> None:
    with pytest.raises(UserError, match=f"--gate, position {position}: ") as caught:
        parse_gate(gate)
    assert message in str(caught.value)
    with pytest.raises(UserError, match="at most 2,000"):
        parse_gate("a > 1 or " * 300)


def test_any_text_is_a_condition_or_one_message() -> None:
    draw = random.Random(0)
    whole = [
        "not",
        "(",
        "exact_match",
        ">=",
        "0.8",
        "or",
        "5%",
        "<",
        "'a'",
        ")",
        "and",
        "difference",
        "(",
        "perplexity",
        ")",
        "<",
        "-1e5",
    ]
    odd = ['"', "'", "=", "é", "\n", "\0", ".", "-", "%", "__class__", "[", "lambda:", *whole]
    parsed = refused = 0
    for _ in range(5000):
        words = [word for word in whole if draw.random() > 0.04]
        if draw.random() < 0.5:
            words.insert(draw.randrange(len(words) + 1), draw.choice(odd))
        try:
            bounds = bounds_of(parse_gate(draw.choice(["", " "]).join(words)))
        except UserError:
            refused += 1
            continue
        parsed += 1
        assert 1 <= len(bounds) <= 4
    assert parsed > 200
    assert refused > 2000


def test_a_name_that_is_not_measured_is_refused_with_the_known_ones() -> None:
    condition = parse_gate("perplexity < 5 and exact_mach >= 0.8")
    with pytest.raises(UserError, match="position 20: `exact_mach` is not measured") as caught:
        check_gate(condition, MEASURED)
    assert "did you mean `exact_match`? Known names: difference(exact_match), exact_match" in str(caught.value)
    require_names(parse_gate("field.team >= 1"), (), ("field.",))
    with pytest.raises(UserError, match="`difference\\(perplexity\\)` is not measured"):
        check_gate(parse_gate("difference(perplexity) < 0"), MEASURED)


def test_a_gate_decides_how_evaluate_ends(
    tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]], call: Call
) -> None:
    made = tiny_run(
        tiny_model(),
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        data={"validation": write_rows(tmp_path / "held.jsonl", rows), "duplicates": "keep"},
    )
    veneer.train(made)
    run = str(tmp_path / "run")

    status, _, error = call("evaluate", run, "--gate", "exact_match >=")
    assert (status, error.count("\n")) == (2, 4)
    assert "position 15" in error
    status, _, error = call("evaluate", run, "--gate", "exakt_match >= 0.5")
    assert status == 2
    assert "did you mean `exact_match`?" in error
    assert not (tmp_path / "run" / "evaluation.json").exists(), "nothing was measured"

    status, out, error = call("evaluate", run, "--json", "--gate", "perplexity <= 1 and exact_match <= 1")
    found = json.loads(out)
    assert status == 1
    assert [(check["id"], check["passed"]) for check in found["gate"]] == [
        ("perplexity <= 1", False),
        ("exact_match <= 1", True),
    ]
    assert "perplexity <= 1" in error
    assert "shown not to hold" in error
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (kept["gate"], kept["comparison"]) == (found["gate"], found["comparison"])
    compared = kept["comparison"]["perplexity"]
    assert compared["difference"]["value"] == pytest.approx(kept["metrics"]["perplexity"]["difference"]["value"])
    assert compared["detectable"] > 0
    assert compared["rows"]["compared"] == len(rows)

    status, out, _ = call("evaluate", run, "--verbose", "--gate", "difference(perplexity) < 1000 or exact_match > 2")
    assert status == 0
    assert out.index("detectable difference") < out.index("95% intervals") < out.index("verdict"), "said before"
    assert "rows that got better" in out
    assert "gate passed" in out


@pytest.mark.parametrize("gate", ["perplexity <= 1e9", "perplexity >= 0", "difference(perplexity) <= 1e9"])
def test_a_value_without_an_interval_shows_nothing(gate: str) -> None:
    unknown = Measured(Interval(3.0, -math.inf, math.inf), 0)
    (check,) = check_gate(parse_gate(gate), {"perplexity": unknown, "difference(perplexity)": unknown})
    assert not check.passed
    assert check.value is None
    assert check.detail == "3: its interval is not known, so nothing is shown"
