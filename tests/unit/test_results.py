"""One type of check for every command that has checks: its keys, its texts, and what has no value."""

import math

import pytest

from veneer.config.results import Check, limit_text, value_text


@pytest.mark.parametrize(
    ("check", "passed", "value", "limit"),
    [
        (Check.at_most("loss", 0.00012345, 0.001, "loss"), True, "0.0001234", "≤ 0.001"),
        (Check.at_most("loss", 2.0, 1.0, "loss"), False, "2", "≤ 1"),
        (Check.at_most("loss", math.nan, 1.0, "loss"), False, "not finite", "≤ 1"),
        (Check.at_most("loss", math.inf, 1.0, "loss"), False, "not finite", "≤ 1"),
        (Check("turns", True, 3, 1, bound="at least"), True, "3", "≥ 1"),
        (Check("agreement", True, 0.987, 0.95, bound="at least", unit="share"), True, "98.7%", "≥ 95%"),
        (Check("weights", True, "5 of 5", "all"), True, "5 of 5", "all"),
        (Check("turns", True, detail="plain text has no turns"), True, "", ""),
    ],
)
def test_a_check_as_a_person_reads_it(check: Check, passed: bool, value: str, limit: str) -> None:
    assert check.passed is passed
    assert (value_text(check.as_dict()), limit_text(check.as_dict())) == (value, limit)
    assert {"id", "passed", "value", "limit", "detail"} <= set(check.as_dict())


def test_a_limit_whose_kind_is_not_known_has_no_sign() -> None:
    """Certificates of earlier versions do not say whether a limit is the largest or the smallest value."""
    check = {"id": "agreement", "passed": True, "value": 0.987, "limit": 0.95, "unit": "share"}
    assert (value_text(check), limit_text(check)) == ("98.7%", "95%")


def test_a_check_names_where_to_look_only_where_it_fails() -> None:
    assert Check.at_most("loss", 2.0, 1.0, "loss", "worst in row 3").detail == "worst in row 3"
    assert Check.at_most("loss", 0.5, 1.0, "loss", "worst in row 3").detail == ""
