"""The words of an answer, without what does not change its meaning: case, punctuation, articles and white space.

The rule is that of SQuAD's evaluation (Rajpurkar et al. 2016, arXiv 1606.05250), with the punctuation of all scripts.
"""

import unicodedata

ARTICLES = ("a", "an", "the")


def words(text: str) -> list[str]:
    """Split a text into comparable words."""
    kept = "".join(letter for letter in text.lower() if not unicodedata.category(letter).startswith("P"))
    return [word for word in kept.split() if word not in ARTICLES]
