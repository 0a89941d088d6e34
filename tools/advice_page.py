"""docs/advice.md, made from the rules themselves: `python -m tools.advice_page > docs/advice.md`."""

from veneer.planning.advice import RULES

HEAD = """\
# What Veneer advises

`veneer plan` and `veneer train` look at a run's settings, its base, its data and its predicted memory and time, and say
what is likely to go wrong, why, and what to change. An error is certain to hurt, a warning likely; info is worth
knowing. Nothing is changed and nothing is refused because of advice.
"""

# Pitfalls of the usual guides that cannot happen here: what they are, and what is done instead.
HANDLED = {
    "8-bit base": "bits: 8 is refused: it needs twice the memory of 4 bits and is slower",
    "forgotten use_cache=False": "every base is loaded without a key-value cache",
    "forgotten prepare_model_for_kbit_training": "gradients reach the adapter without it; the first step is checked "
    "for that, and a loss that is not a number ends the run",
    "forgotten enable_input_require_grads": "non-reentrant recomputation does not need it, and the first step is "
    "checked for gradients",
    "get_peft_model without a config": "every run has an adapter configuration",
    "saving the full model": "only the adapter is saved",
    "merging in float16": "a merge is computed in float32 and rounded once, to bfloat16 unless --dtype says otherwise",
    "merging into a 4-bit base": "an adapter is merged into the dequantized base",
    "hand-written template": "only the model's template renders rows, and `veneer data` shows every token",
    "padding that masks the end token": "rows of data hold no padding tokens",
    "packed rows that attend to each other": "documents stay apart in every engine, and `veneer verify` checks it",
    "a target that matches nothing": "refused, with the nearest names",
}


def advice_page() -> str:
    """The page: the rules, then what cannot go wrong here."""
    rules = [f"| `{rule.id}` | {rule.severity} | `{rule.setting}` | {rule.source} |" for rule in RULES]
    handled = [f"| {pitfall} | {instead} |" for pitfall, instead in HANDLED.items()]
    return "\n".join(
        [
            *(HEAD, "| rule | severity | setting | source |\n|---|---|---|---|", *rules),
            *("\n## Pitfalls that Veneer rules out\n", "| pitfall of guides | in Veneer |\n|---|---|", *handled, ""),
        ]
    )


if __name__ == "__main__":
    print(advice_page(), end="")
