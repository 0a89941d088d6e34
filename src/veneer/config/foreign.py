"""Names our setting for those of TRL, PEFT, Transformers, Axolotl, LLaMA-Factory and Unsloth (foreign.yaml).

A guess by likeness would send `min_length` to `max_length`; so only a misspelling of one of our own names is answered
with that name (`misspelt`).
"""

from collections.abc import Iterable
from functools import cache

from veneer.config.files import packaged_table


@cache
def names_of_others() -> tuple[dict[str, str], dict[str, str]]:
    """Settings of other tools: what ours of the same meaning is called; for all others, what to write instead."""
    table = packaged_table("veneer.config", "foreign.yaml")
    called = {theirs: ours for ours, names in table["called"].items() for theirs in names}
    return called, {theirs: found["answer"] for found in table["instead"] for theirs in found["names"]}


def foreign(name: str) -> str | None:
    """Advice on what to write instead of another tool's setting; None: it is not known as one."""
    called, others = names_of_others()
    name = name.lower().replace("-", "_")
    if name in called:
        return f"it is called `{called[name]}` here"
    if name not in others:
        return None
    instead = others[name]
    if "is called" in instead:
        return instead
    kind, _, why = instead.partition("nothing: ")
    return f"not in Veneer: {why}" if not kind else f"not in Veneer; instead: {instead}"


def misspelt(name: str, known: Iterable[str]) -> str | None:
    """The one of our names that this is a misspelling of, if any.

    A word may have a slip of one letter, a long one two: `lenght` is `length`, but `min_length` is not `max_length`.
    """
    near = [ours for ours in known if len(ours) >= 4 and _is_slip(name.lower(), ours)]
    return min(near, key=lambda ours: _distance(name, ours), default=None)


def _is_slip(name: str, ours: str) -> bool:
    if len(name) == len(ours) == 4 and sorted(name) != sorted(ours):
        return False  # bits and bias
    if _distance(name.replace("_", "").replace("-", ""), ours.replace("_", "")) <= 1:
        return True
    words, our_words = name.split("_"), ours.split("_")
    return len(words) == len(our_words) and all(
        _distance(word, our) <= (0 if len(our) <= 2 else 1 if len(our) <= 6 else 2)
        for word, our in zip(words, our_words)
    )


def _distance(a: str, b: str) -> int:
    """Letters to insert, delete, replace, or swap with their neighbour, to make one word of the other."""
    before, last = list[int](), list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, last = last, row
    return last[-1]
