"""Suites: what a model can do beside the task it was tuned for, asked of base and tuned model, checked by program.

suite.py        what a suite is: items and a checker
responder.py    a loaded model that answers them
compare.py      base against tuned: differences by suite, and what was forgotten
memorisation.py how much of the training rows a model gives back
personal.py     personal data in answers, counted

Each other file is one suite; its items lie beside it, a JSON object a line, written for this project and under its
licence. A suite is a file with a `SUITE`, its items, and its line here.
"""

import difflib

from veneer.config.errors import UserError
from veneer.evaluation.suites import (
    answers_harmless,
    arithmetic,
    instructions,
    json_form,
    knowledge,
    refusal_harmful,
    tool_form,
)
from veneer.evaluation.suites.suite import Item, Suite

ABILITIES = (  # what a model may forget; the mean loss over these is `forgetting`
    knowledge.SUITE,
    arithmetic.SUITE,
    instructions.SUITE,
    json_form.SUITE,
    tool_form.SUITE,
)
SUITES = (*ABILITIES, refusal_harmful.SUITE, answers_harmless.SUITE)
FORGETTING = "forgetting"
ALL = "all"


def find_suites(names: str) -> tuple[Suite, ...]:
    """Return suites by their names with commas between; `all` stands for every one.

    Raises:
        UserError: There is no such suite.
    """
    known = {suite.name: suite for suite in SUITES}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted or [names]:
        if name != ALL and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            fix = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--suites {name}: no such suite", f"{fix}known are {', '.join(known)}; {ALL}: every one")
    return SUITES if ALL in wanted else tuple(suite for suite in SUITES if suite.name in wanted)


__all__ = ["ABILITIES", "ALL", "FORGETTING", "SUITES", "Item", "Suite", "find_suites"]
