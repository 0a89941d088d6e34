"""The plots of comparisons on a run's page: marks on a scale, and verdicts in words."""

from typing import Any

from veneer.report.interval_plot import LEFT, RIGHT, WIDTH, interval_plots


def metric(unit: str, base: tuple[float, float, float], tuned: tuple[float, float, float]) -> dict[str, Any]:
    names = ("low", "value", "high")
    return {"unit": unit, "base": dict(zip(names, base)), "tuned": dict(zip(names, tuned))}


def test_a_share_stands_on_a_scale_from_none_to_all() -> None:
    metrics = {"field.team": metric("share", (0.0, 0.25, 0.5), (0.5, 0.75, 1.0))}
    (plot,) = interval_plots(metrics, {"field.team": {"verdict": "better"}})
    assert (plot["name"], plot["verdict"], plot["is_better"], plot["ends"]) == (
        "team",
        "better",
        True,
        ("0 %", "100 %"),
    )
    base, tuned = plot["marks"]
    assert (base["low"], tuned["high"]) == (LEFT, WIDTH - RIGHT)
    assert base["high"] == tuned["low"]
    assert (base["text"], tuned["text"], tuned["is_tuned"]) == ("25.0 %", "75.0 %", True)


def test_other_values_have_a_scale_of_their_own_and_infinite_ones_none() -> None:
    metrics = {
        "perplexity": metric("", (8.0, 9.0, 10.0), (4.0, 5.0, 6.0)),
        "bits": metric("", (1.0, 1.0, float("inf")), (1.0, 1.0, 1.0)),
        "same": metric("", (2.0, 2.0, 2.0), (2.0, 2.0, 2.0)),
    }
    perplexity, same = interval_plots(metrics, {"perplexity": {"verdict": "equal within 0.3"}})
    assert perplexity["ends"] == ("4", "10")
    assert perplexity["verdict"] == "equal within 0.3"
    assert {mark["value"] for mark in same["marks"]} == {LEFT}
    share = {"a": metric("share", (0.0, 0.5, 1.0), (0.0, 0.5, 1.0))}
    assert interval_plots(share, {"a": {"verdict": "equal within 0.095"}})[0]["verdict"] == "equal within 9.5 points"
