"""Arithmetic: sums, products, shares, sequences and word problems of one or two steps, each with one number as answer.

The last number of the answer decides, so working shown before it does no harm; a thousands separator is read over.
"""

import re

from veneer.evaluation.suites.suite import Item, Suite, final_text

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def is_right(item: Item, answer: str) -> bool:
    """Return whether the last number of the answer is the item's."""
    found = _NUMBER.findall(final_text(answer).replace("\u2212", "-"))
    return bool(found) and float(found[-1].replace(",", "")) == item["answer"]


SUITE = Suite(
    name="arithmetic",
    shows="whether small sums and word problems of one or two steps are still solved",
    cannot_show="long reasoning, algebra or proofs; a right number may follow wrong working",
    is_right=is_right,
    max_new_tokens=48,
)
