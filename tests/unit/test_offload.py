"""Tensors on the host: whatever a placement moves, losses and gradients are the resident run's to the last bit.

Here by the torch twins, on a CPU; tests/gpu/test_memory.py has the same with streams.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.support.engines import COVERED, batch_of
from tests.support.offload import OFFLOADS, RESIDENT, STEPS, Step, assert_same, course, nf4_model, placement_of
from veneer.engine.fused.engine import FusedEngine

# Documents of unlike lengths, then several micro-batches of two shapes; without recordings no other shape is new.
SHORT = STEPS[2:4]
WITHOUT_DROPOUT = ("nothing kept", "all on the host", "all streamed with the ends", "everything at once")


def engine_of(name: str, **model: Any) -> FusedEngine:
    engine = FusedEngine(nf4_model(**model))
    engine.apply(placement_of(engine, OFFLOADS.get(name, RESIDENT)))
    return engine


@cache
def resident(**model: Any) -> list[Step]:
    return course(engine_of("resident", **model), SHORT)


@pytest.mark.parametrize(
    ("name", "dropout"), [*((name, 0.3) for name in OFFLOADS), *((name, 0.0) for name in WITHOUT_DROPOUT)]
)
def test_a_placement_changes_no_bit(name: str, dropout: float) -> None:
    assert_same(course(engine_of(name, lora_dropout=dropout), SHORT), resident(lora_dropout=dropout))


@pytest.mark.parametrize("name", ["all on the host", "everything at once"])
@pytest.mark.parametrize("family", [family for family in COVERED if family != "llama"])
def test_nor_in_any_family(family: str, name: str) -> None:
    assert_same(course(engine_of(name, family=family), SHORT), resident(family=family))


@pytest.mark.parametrize("name", ["ends streamed", "everything at once"])
def test_nor_where_the_head_is_the_embedding(name: str) -> None:
    tied = {"tie_word_embeddings": True}
    assert_same(course(engine_of(name, changes=tied), SHORT), course(engine_of("resident", changes=tied), SHORT))


def test_a_placement_may_change_from_step_to_step() -> None:
    engine = engine_of("resident")
    names = ("all streamed", "everything at once", "x on the host", "nothing kept", "half streamed", "ends streamed")
    placements = [placement_of(engine, offload) for offload in (*(OFFLOADS[name] for name in names), RESIDENT)]
    steps = (STEPS[0], STEPS[2]) * 4
    assert_same(course(engine, steps, placements), course(engine_of("resident"), steps))


def test_streamed_adapters_count() -> None:
    """Weights that are fetched for each use must be those that the adapters' current values were put into."""
    engine, batch = engine_of("everything at once"), batch_of()
    with_adapter = engine.token_logprobs(batch)
    with engine.adapter_off():
        without = engine.token_logprobs(batch)
    assert (with_adapter != without).float().mean() > 0.9
    assert torch.equal(engine.token_logprobs(batch), with_adapter)
    assert torch.equal(engine_of("resident").token_logprobs(batch), with_adapter)


@pytest.mark.parametrize("pinned", [0, 2])
def test_weights_for_which_there_is_no_memory_to_pin_are_staged(pinned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first blocks are pinned, and the others, perhaps memory-mapped, stay where they are."""
    free = iter([2**40] * pinned + [0] * 100)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=next(free)))
    engine = engine_of("all streamed")
    staged = [number for number, host in engine._weights._host.items() if host is None]
    assert staged == list(range(pinned, len(engine.blocks)))
    assert_same(course(engine, SHORT), resident())
