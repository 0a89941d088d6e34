"""General knowledge: which of four short answers is the likeliest after the question.

The likelihood of whole answers is compared and no text is read, so a model that has learnt to answer in another form
(JSON, say) loses nothing here as long as it still knows. Guessing gives 25%.
"""

from veneer.evaluation.suites.suite import Item, Suite


def is_right(item: Item, answer: str) -> bool:
    """Return whether the chosen answer is the right one."""
    return bool(answer == item["answer"])


SUITE = Suite(
    name="knowledge",
    shows="whether facts of general school knowledge are still preferred to wrong ones (guessing gives 25%)",
    cannot_show="knowledge of a special field, of recent events or in other languages than English",
    is_right=is_right,
    by_choice=True,
)
