"""docs/advice.md, made from the rules themselves: `python -m veneer.planning.reference > docs/advice.md`."""

from veneer.planning.advice import HANDLED, RULES

HEAD = """\
# What Veneer advises

`veneer plan` and `veneer train` look at a run's settings, its base, its data and what is foreseen of it, and say what
is likely to go wrong, why, and what to change. An error is certain to hurt, a warning likely; info is worth knowing.
Nothing is changed and nothing is refused because of advice.
"""


def advice_page() -> str:
    """The page: the rules, then what cannot go wrong here."""
    rules = [f"| `{rule.id}` | {rule.severity} | `{rule.setting}` | {rule.source} |" for rule in RULES]
    handled = [f"| {pitfall} | {instead} |" for pitfall, instead in HANDLED.items()]
    return "\n".join(
        [
            *(HEAD, "| rule | severity | setting | known from |\n|---|---|---|---|", *rules),
            *("\n## What cannot go wrong here\n", "| pitfall of the usual guides | here |\n|---|---|", *handled, ""),
        ]
    )


if __name__ == "__main__":
    print(advice_page(), end="")
