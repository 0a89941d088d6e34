"""What the fused engine finds out about memory before training, and what it spends it on."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.engines import model_of
from veneer.engine.fused import FusedEngine
from veneer.engine.fused.block import TENSORS
from veneer.engine.fused.cudnn import ROOM_BYTES, Call
from veneer.engine.fused.spend import spend
from veneer.training.job import vary


def test_memory_is_spent_where_it_saves_most() -> None:
    engine = FusedEngine(model_of("llama"))
    blocks, tokens = engine.blocks, 512
    everything = sum(block.kept_bytes(name, tokens) for block in blocks for name in TENSORS)
    assert spend(blocks, tokens, 64, 0, 0, 0).keep == (frozenset(), frozenset())
    assert spend(blocks, tokens, 64, 0, everything, 0).keep == (frozenset(TENSORS),) * 2
    half = spend(blocks, tokens, 64, 0, everything // 2, 0)
    assert half.spent_bytes <= everything // 2
    assert len(half.keep[1]) >= len(half.keep[0])
    rates = {name: blocks[0].kept_seconds(name, tokens, 64) / blocks[0].kept_bytes(name, tokens) for name in TENSORS}
    assert max(rates, key=lambda name: rates[name]) in half.keep[1]


@pytest.mark.parametrize(
    ("lengths", "trained", "rows", "varies"),
    [
        ((40, 40, 40, 40), (9, 9, 9, 9), 2, False),
        ((40, 40, 40, 39), (9, 9, 9, 9), 2, True),
        ((40, 40, 40, 40), (9, 9, 9, 8), 2, True),
        ((40, 40, 40), (9, 9, 9), 2, True),
    ],
)
def test_a_pass_that_is_not_the_recorded_one_is_reckoned_with(
    lengths: tuple[int, ...], trained: tuple[int, ...], rows: int, varies: bool
) -> None:
    """It needs its own memory beside the recorded ones: the last rows of an epoch, say, that fill no micro-batch."""
    corpus = SimpleNamespace(trained=np.array(trained))
    part: Any = SimpleNamespace(lengths=np.array(lengths), corpus=corpus, examples=np.arange(len(lengths)))
    assert vary(part, part.lengths, rows) == varies


@pytest.mark.parametrize("varies", [False, True])
def test_memory_is_measured_with_the_attention_that_batches_get(varies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FusedEngine(model_of("llama"))
    seen: list[bool] = []
    peaks = iter((7, 9))
    monkeypatch.setattr(FusedEngine, "on_gpu", True)
    monkeypatch.setattr(FusedEngine, "_peak_of", lambda self, compute: compute() or next(peaks))
    monkeypatch.setattr(FusedEngine, "_pass", lambda self, inputs: seen.append(inputs.documents.is_even))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    found = engine.fit((64, 64), 2**20, varies=varies)
    assert seen == ([True, False] if varies else [True])
    assert found["least_bytes"] == (9 if varies else 7)


def test_attention_gets_room_before_anything_is_kept() -> None:
    engine = FusedEngine(model_of("llama"))
    blocks, heads = engine.blocks, engine.decoder.heads
    rows, length = 64, 4096
    usual = Call.of(rows, length, heads, ROOM_BYTES).workspace_bytes(length)
    whole = Call(rows, heads).workspace_bytes(length)
    tokens = rows * length
    ample = spend(blocks, tokens, length, rows, 2**50, 0)
    assert ample.room_bytes == whole
    assert ample.spent_bytes - (whole - usual) == spend(blocks, tokens, length, 0, 2**50, 0).spent_bytes
    assert ample.keep == (frozenset(TENSORS),) * 2

    tight = spend(blocks, tokens, length, rows, whole, 0)
    assert usual < tight.room_bytes < whole
    assert tight.room_bytes - usual <= whole // 2
    assert tight.room_bytes - usual <= tight.spent_bytes <= whole

    for none in (spend(blocks, tokens, length, rows, 0, 0), spend(blocks, tokens, length, 0, 2**50, 0)):
        assert none.room_bytes == ROOM_BYTES
