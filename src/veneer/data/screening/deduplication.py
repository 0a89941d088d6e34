"""Finds rows that are alike or share long passages: duplicates, near-duplicates, overlap with held-out files.

Likeness is judged on words, without case and punctuation, of what a row says (no system prompt, no template). Every
word becomes a number and every run of words (an n-gram) a number made of theirs, for a whole block of rows at a time.

Near-duplicates share at least THRESHOLD of their 5-grams (Jaccard similarity). It is estimated from a signature of 64
bytes a row: one hash of every n-gram, the smallest in each of 64 bins (one-permutation MinHash, Li et al. 2012,
with empty bins filled from the next, Shrivastava and Li 2014). Pairs to compare are found by bands of four bytes that
agree. The estimate's standard error is 0.05.

Overlap is found by 13-grams, as in GPT-3's study of contamination (arXiv 2005.14165, appendix C).
"""

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

SHINGLE = 5  # words
OVERLAP = 13  # words
BINS = 64
BAND = 4
THRESHOLD = 0.8
LONGEST = 1 << 18  # characters of a row that are looked at
_P, _Q = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


def word_hashes(texts: Sequence[str]) -> tuple[Any, Any]:
    """Numbers of all words of some texts, one behind the other (uint64), and where each text begins and ends.

    A word is a run of letters and digits; in scripts that put no spaces between words every character is one.
    """
    texts = [text[:LONGEST].lower() + "\n" for text in texts]
    joined = "".join(texts)
    bounds = np.cumsum([0] + [len(text) for text in texts])
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds = _kinds()[np.minimum(codes, 0xFFFF)]
    inside = kinds > 0
    begins = inside & ~(np.roll(inside, 1) & (kinds == 1) & (np.roll(kinds, 1) == 1))
    ends = inside & ~(np.roll(inside, -1) & (kinds == 1) & (np.roll(kinds, -1) == 1))
    starts, stops = np.flatnonzero(begins), np.flatnonzero(ends) + 1
    with np.errstate(over="ignore"):
        # A polynomial in the characters from the word's first on: sums of prefixes, moved back to the first place.
        powers, inverse = _powers(len(codes))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((codes.astype(np.uint64) + _Q) * powers)])
        words = _mixed((sums[stops] - sums[starts]) * inverse[starts])
    return words, np.searchsorted(starts, bounds)


def grams(words: Any, bounds: Any, n: int) -> tuple[Any, Any]:
    """Numbers of all n-grams (uint64) and the text of each; a text of fewer words has one, of all its words."""
    counts = np.diff(bounds)
    size = np.minimum(counts, n)
    per_text = np.maximum(counts - n + 1, (counts > 0).astype(np.int64))
    owner = np.repeat(np.arange(len(counts)), per_text)
    first = np.arange(len(owner)) - np.repeat(np.cumsum(per_text) - per_text, per_text) + bounds[owner]
    value = np.zeros(len(owner), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for k in range(n):
            has = k < size[owner]
            word = words[np.minimum(first + k, max(0, len(words) - 1))] if len(words) else value
            value = np.where(has, value * _P + word, value)
    return _mixed(value), owner


def signatures(texts: Sequence[str]) -> Any:
    """A signature of each text: uint8, shape (texts, BINS)."""
    values, owner = grams(*word_hashes(texts), SHINGLE)
    empty = np.uint64(0xFFFFFFFFFFFFFFFF)
    smallest = np.full(len(texts) * BINS, empty, dtype=np.uint64)
    cell = owner * BINS + (values >> np.uint64(58)).astype(np.int64)
    order = np.argsort(cell, kind="stable")
    cells, firsts = np.unique(cell[order], return_index=True)
    if len(cells):
        smallest[cells] = np.minimum.reduceat(values[order] << np.uint64(6), firsts)
    bins = smallest.reshape(len(texts), BINS)
    for row in np.flatnonzero(np.bincount(owner, minlength=len(texts)) == 0).tolist():  # no words: alike only if equal
        bins[row] = zlib.crc32(texts[row].encode("utf-8", "surrogatepass"))
    filled = bins.copy()
    with np.errstate(over="ignore"):
        for distance in range(1, BINS):
            holes = filled == empty
            if not holes.any():
                break
            borrowed = np.roll(bins, -distance, axis=1)
            usable = holes & (borrowed != empty)
            filled = np.where(usable, borrowed + np.uint64(distance) * _Q, filled)
    return (_mixed(filled) >> np.uint64(56)).astype(np.uint8)


def near_duplicates(count: int, load: Callable[[int, int], Any], slab: int = 1 << 20) -> Any:
    """For each row the first row it is nearly equal to, or itself; int64, shape (count,).

    Args:
        count: Rows.
        load: load(start, stop) gives their signatures; called with slabs, so that they need not fit in memory.
        slab: Rows loaded at a time.
    """
    first = np.arange(count)
    for band in range(BINS // BAND):
        keys = np.empty(count, dtype=np.uint32)
        for at in range(0, count, slab):
            part = load(at, min(count, at + slab))[:, band * BAND : (band + 1) * BAND]
            keys[at : at + slab] = np.ascontiguousarray(part).view(np.uint32)[:, 0]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        repeats = np.concatenate([[False], keys[1:] == keys[:-1]])
        # Every row of a bucket is compared with the bucket's first.
        heads = np.flatnonzero(~repeats)
        same = np.flatnonzero(repeats)
        head_of = order[heads[np.searchsorted(heads, same, side="right") - 1]]
        _join(first, head_of, order[same], load)
    while not np.array_equal(first, first[first]):
        first = first[first]
    return first


def _join(first: Any, a: Any, b: Any, load: Callable[[int, int], Any]) -> None:
    """Union of the pairs that are alike enough."""
    for at in range(0, len(a), 4096):
        heads, rows = a[at : at + 4096], b[at : at + 4096]
        kept = first[heads] != first[rows]
        heads, rows = heads[kept], rows[kept]
        if not len(heads):
            continue
        like = np.array([(load(i, i + 1)[0] == load(j, j + 1)[0]).mean() for i, j in zip(heads, rows)])
        # Bytes agree by chance once in 256.
        for i, j in zip(heads[like >= THRESHOLD], rows[like >= THRESHOLD]):
            one, other = sorted((_root(first, i), _root(first, j)))
            first[other] = one


def _root(first: Any, row: int) -> int:
    while first[row] != row:
        first[row] = first[first[row]]
        row = first[row]
    return int(row)


class Overlap:
    """Finds held-out rows that share 13 words in a row with training rows.

    Args:
        texts: The held-out rows.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        values, owner = self._long_grams(texts)
        order = np.argsort(values, kind="stable")
        self._values, self._owner = values[order], owner[order]
        self._found = np.zeros(len(values), dtype=bool)

    def look(self, texts: Sequence[str]) -> None:
        """Mark what some training rows share."""
        if len(self._values):
            values, _ = self._long_grams(texts)
            self._found |= np.isin(self._values, values)

    def rows(self) -> list[int]:
        """Held-out rows that share a passage with what was looked at."""
        return sorted({int(owner) for owner in self._owner[self._found]})

    @staticmethod
    def _long_grams(texts: Sequence[str]) -> tuple[Any, Any]:
        """13-grams; a shorter text is one gram, so that it counts where it is there word for word."""
        return grams(*word_hashes(texts), OVERLAP)


def _mixed(values: Any) -> Any:
    """Spread numbers evenly (the finalizer of SplitMix64)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def _powers(count: int) -> tuple[Any, Any]:
    """p^0, p^1, ... and their inverses, modulo 2^64."""
    powers, inverse = _powers_of_size(1 << max(16, count.bit_length()))
    return powers[:count], inverse[:count]


@cache
def _powers_of_size(size: int) -> tuple[Any, Any]:
    inverse = np.uint64(pow(int(_P), -1, 1 << 64))
    with np.errstate(over="ignore"):
        tables = []
        for base in (_P, inverse):
            table = np.full(size, base, dtype=np.uint64)
            table[0] = 1
            tables.append(np.cumprod(table, dtype=np.uint64))
    return tables[0], tables[1]


@cache
def _kinds() -> Any:
    """For every character of the basic plane: 0 no word, 1 part of a word, 2 a word by itself. Others count as 2."""
    kinds = np.array([chr(code).isalnum() for code in range(0x10000)], dtype=np.uint8)
    kinds[0x2E80:0xD7B0] *= 2  # Han, kana, Hangul
    kinds[0x0E00:0x1000] *= 2  # Thai, Lao, Tibetan
    kinds[0x1780:0x1800] *= 2  # Khmer
    kinds[0xFFFF] = 2
    return kinds
