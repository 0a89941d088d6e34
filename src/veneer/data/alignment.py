"""Aligns words with the tokens of their text by characters, the same way for training rows and for plain texts.

Tokenizers disagree on what a word is, and those of byte pairs treat a word without the space before it as another one.
So a text is tokenized as it is, and a word belongs to the tokens whose characters it shares.
"""

from collections.abc import Sequence

Span = tuple[int, int]  # first character, and the one behind the last


def first_tokens(offsets: Sequence[Span], words: Sequence[Span]) -> list[int | None]:
    """Return the first token of each word; None where it has no token of its own.

    Such words are of characters that the tokenizer drops, or lie in a token that began with the word before.

    Args:
        offsets: characters of each token; special tokens have none.
        words: characters of each word, rising.
    """
    firsts: list[int | None] = []
    at = 0
    for start, end in words:
        while at < len(offsets) and (offsets[at][0] == offsets[at][1] or offsets[at][1] <= start):
            at += 1
        is_found = at < len(offsets) and offsets[at][0] < end
        firsts.append(at if is_found else None)
        at += is_found
    return firsts
