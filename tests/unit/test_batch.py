"""Which rows stand in which step, and packing."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from veneer.data.batch import UNTRAINED, Batch, Batches, Example, pack


def example(length: int, first: int = 0) -> Example:
    ids = np.arange(first, first + length, dtype=np.int32)
    return Example(ids, ((1, length, 1.0),), "")


def batches(examples: list[Example], batch_size: int, accumulation: int, pack_length: int | None = None) -> Batches:
    lengths = np.array([len(e.ids) for e in examples])
    return Batches(examples, lengths, batch_size, accumulation, 3, pack_length)


def test_a_batch_lays_documents_one_behind_the_other() -> None:
    batch = Batch.of([example(3), example(2, 10)])
    assert batch.ids_T.tolist() == [0, 1, 2, 10, 11]
    assert batch.targets_T.tolist() == [1, 2, UNTRAINED, 11, UNTRAINED]
    assert batch.weights_T.tolist() == [1, 1, 0, 1, 0]
    assert (batch.lengths, batch.trained, batch.weight, batch.tokens) == ((3, 2), 3, 3.0, 5)


def test_a_tokens_weight_stands_where_it_is_predicted() -> None:
    batch = Batch.of([Example(np.array([5, 6, 7], np.int32), ((1, 2, 0.5),), "")])
    assert batch.targets_T.tolist() == [6, UNTRAINED, UNTRAINED]
    assert batch.weights_T.tolist() == [0.5, 0, 0]
    assert (batch.trained, batch.weight) == (1, 0.5)


def test_every_row_stands_once_in_an_epoch_however_a_step_is_cut() -> None:
    examples = [example(2 + n % 7, n) for n in range(21)]

    def rows(batch_size: int, accumulation: int, step: int) -> list[int]:
        made = batches(examples, batch_size, accumulation)
        firsts = [int(ids[0]) for batch in made.step(step) for ids in torch.split(batch.ids_T, list(batch.lengths))]
        return sorted(firsts)

    assert batches(examples, 8, 1).steps_per_epoch == 3
    assert sorted(row for step in range(3) for row in rows(8, 1, step)) == list(range(21))
    for step in range(6):
        assert rows(8, 1, step) == rows(4, 2, step) == rows(1, 8, step)
    assert [rows(8, 1, step) for step in range(3)] != [rows(8, 1, step) for step in range(3, 6)], "another order"


def test_a_step_may_be_asked_for_in_any_order() -> None:
    made = batches([example(2 + n % 7, n) for n in range(40)], 4, 2)
    forward = [made.step(n)[0].ids_T.tolist() for n in range(12)]
    assert [made.step(n)[0].ids_T.tolist() for n in reversed(range(12))] == forward[::-1]


def test_rows_of_a_step_are_of_like_length_and_long_steps_come_at_any_time() -> None:
    rng = np.random.default_rng(0)
    made = batches([example(int(n)) for n in rng.integers(2, 400, 640)], 8, 1)
    spreads = [max(batch.lengths) - min(batch.lengths) for n in range(80) for batch in made.step(n)]
    assert np.mean(spreads) < 60  # of about 320 in rows drawn at random
    longest = [max(made.step(n)[0].lengths) for n in range(80)]
    assert abs(np.corrcoef(longest, range(80))[0, 1]) < 0.3


def packs(lengths: Any, length: int) -> list[list[int]]:
    lengths = np.array(lengths)
    pack_of = pack(lengths, length)
    return [lengths[pack_of == n].tolist() for n in range(pack_of.max() + 1)]


def test_packing_fills_packs_and_loses_nothing() -> None:
    lengths = [3, 9, 5, 2, 7, 4, 10, 1, 6, 8]
    made = packs(lengths, 10)
    assert sorted(n for members in made for n in members) == sorted(lengths)
    assert all(sum(members) <= 10 for members in made)
    assert len(made) == 6  # 55 tokens


def test_packing_takes_the_fullest_pack_that_has_room() -> None:
    assert packs([6, 5, 4, 3], 10) == [[6, 4], [5, 3]]
    assert packs([10, 10], 10) == [[10], [10]]


def test_packs_of_real_lengths_have_few_shapes() -> None:
    lengths = np.random.default_rng(1).gamma(3, 70, 5000).astype(int).clip(5, 2048)
    made = Batches([example(2)] * 5000, lengths, 1, 1, 0, 2048)
    assert made.sizes.sum() / (len(made.sizes) * 2048) > 0.99
    assert len(np.unique(-(-made.sizes[:-1] // 128))) <= 3


def test_the_rows_that_hold_most_documents_are_found() -> None:
    examples = [example(length) for length in (90, 80, 70, 10, 9, 8, 30)]  # packs 90 + 10, 80 + 9 + 8, 70 + 30
    assert sorted(batches(examples, 1, 1, 100).most_documents()) == [8, 9, 80]
    assert len(batches(examples, 2, 1, 100).most_documents()) == 5
    assert len(batches(examples, 3, 1).most_documents()) == 3


def test_a_batch_is_halved_between_documents_with_all_that_belongs_to_its_tokens() -> None:
    whole = Batch.of([example(length, 10 * length) for length in (9, 2, 3, 5, 4)]).scaled(0.5)
    whole = replace(whole, values={"reference": torch.arange(23.0)})
    first, second = whole.halved()
    assert (first.lengths, second.lengths) == ((9, 2), (3, 5, 4)), "11 tokens of 23"
    for name in ("ids_T", "targets_T", "weights_T"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(whole, name))
    assert torch.equal(torch.cat([first.values["reference"], second.values["reference"]]), torch.arange(23.0))
    assert (first.trained, first.weight, second.trained, second.weight) == (9, 9.0, 9, 9.0)
    assert first.scale == second.scale == 0.5
    assert [half.lengths for half in Batch.of([example(9), example(2)]).halved()] == [(9,), (2,)]


def test_the_largest_micro_batches_are_of_most_tokens_and_of_most_documents() -> None:
    examples = [example(length) for length in (60, 60, 50, 50, *[4] * 20)]
    (largest,) = batches(examples, 2, 1).largest()
    assert largest.lengths == (60, 60)
    made = batches(examples, 1, 1, pack_length=64)
    fullest, fragmented = made.largest()
    assert fullest.tokens == max(batch.tokens for n in range(made.steps_per_epoch) for batch in made.step(n))
    assert fragmented.lengths == made.most_documents() == (4,) * 12
