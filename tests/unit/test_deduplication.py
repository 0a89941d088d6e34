"""Near-duplicates and shared passages, by words."""

import random
from typing import Any

import numpy as np
import pytest

from veneer.data.screening.deduplication import Overlap, grams, near_duplicates, signatures, word_hashes

WORDS = [f"w{n}" for n in range(500)]


def text(seed: int, length: int = 60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def clusters(texts: list[str], slab: int = 1 << 20) -> list[int]:
    found = signatures(texts)
    result: list[int] = near_duplicates(len(texts), lambda a, b: found[a:b], slab).tolist()
    return result


def words(text: str) -> list[Any]:
    hashes, _ = word_hashes([text])
    return list(hashes.tolist())


def test_words_are_the_same_whatever_stands_around_them() -> None:
    assert words("The cat, the CAT!") == words("the cat the cat")
    assert words("the cat")[1] == words("a dog and cat")[3]
    assert words("ab c") != words("a bc")
    assert len(words("don't  stop\n2 times")) == 5
    assert len(words("猫は好き")) == 4
    assert len(words("Größe naïve ΑΒΓ")) == 3
    assert words("") == words(" .,!") == []


def test_grams_stay_within_their_text() -> None:
    hashes, bounds = word_hashes(["a b c d", "", "e f", "a b c d"])
    values, owner = grams(hashes, bounds, 3)
    assert owner.tolist() == [0, 0, 2, 3, 3]
    assert values[:2].tolist() == values[3:].tolist()


@pytest.mark.parametrize("slab", [1 << 20, 2])
def test_texts_that_share_most_of_their_words_are_near_duplicates(slab: int) -> None:
    base = text(1)
    changed = [*base[:-1], "other"]
    half = base[:30] + text(2, 30)
    texts = [" ".join(text(3)), " ".join(base), " ".join(half), " ".join(changed).upper() + "!", " ".join(text(4))]
    assert clusters(texts, slab) == [0, 1, 2, 1, 4]


def test_short_texts_are_alike_only_where_they_say_the_same() -> None:
    assert clusters(["yes", "Yes.", "no", "yes please"]) == [0, 0, 2, 3]


def test_texts_without_words_are_alike_only_where_they_are_equal() -> None:
    assert clusters(["+ + +", "? !", "+ + +", ""]) == [0, 1, 0, 3]


def test_many_equal_texts_are_one_cluster() -> None:
    assert clusters([" ".join(text(n % 3)) for n in range(300)]) == [n % 3 for n in range(300)]


def test_the_estimate_agrees_with_the_share_of_common_passages() -> None:
    base = text(5, 400)
    for changes, alike in ((4, True), (40, False)):
        other = list(base)
        for n in range(changes):
            other[n * 9] = "changed"
        assert (clusters([" ".join(base), " ".join(other)]) == [0, 0]) is alike


def test_held_out_rows_that_share_a_passage_are_found() -> None:
    passage = " ".join(text(6, 13))
    overlap = Overlap(["before " + passage + " after", " ".join(text(7)), "a short one", "a short one more"])
    overlap.look([" ".join(text(8)) + " " + passage, "something else"])
    assert overlap.rows() == [0]
    overlap.look(["A SHORT one!"])
    assert overlap.rows() == [0, 2]
    Overlap([]).look(["a"])


def test_signatures_do_not_depend_on_the_company() -> None:
    texts = [" ".join(text(n)) for n in range(5)]
    together = signatures(texts)
    for n, one in enumerate(texts):
        assert np.array_equal(signatures([one])[0], together[n])
