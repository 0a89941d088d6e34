"""What the fused engine finds out about memory before training, and where it has the tensors of a step."""

import json
from dataclasses import replace
from io import StringIO
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.support.engines import batch_of, model_of
from tests.support.offload import nf4_model
from tests.support.runs import tiny_run, write_rows
from veneer.cli.show_placement import show_placement
from veneer.engine.fused.block import ACTIVATIONS
from veneer.engine.fused.cudnn import WORKSPACE_BYTES, Call
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.packed import block_bytes
from veneer.engine.fused.policy import Demand, block_placement, choose_placement, tightest, uniform
from veneer.engine.interface import BatchShapes
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.placement import MemoryPlacement, Rates
from veneer.engine.reference import ReferenceEngine
from veneer.engine.trace import rounded
from veneer.training.job import TrainingJob
from veneer.training.run_batches import vary

HUGE = 2**50
EVERYTHING = frozenset(ACTIVATIONS)


def kept(placement: MemoryPlacement) -> list[frozenset[str]]:
    return [block.kept for block in placement.blocks]


def filled(engine: FusedEngine, tokens: int, longest: int, rows: int, spare_bytes: int) -> MemoryPlacement:
    """The placement with so much memory beside a pass that keeps nothing."""
    budget = HUGE // 4  # of which pages that cannot be filled are a part
    demand = Demand(tokens, longest, rows, int(budget * 0.98) - spare_bytes)
    return choose_placement(engine.blocks, demand, budget, False)


@pytest.mark.parametrize(
    ("tokens", "is_packed", "records"), [(64, False, True), (2**26, False, False), (2**26, True, True)]
)
def test_uneven_rows_of_long_passes_are_launched_unless_they_are_packed(
    tokens: int, is_packed: bool, records: bool
) -> None:
    engine = FusedEngine(model_of("llama"))
    demand = Demand(tokens, 64, 0, 2**20, varies=True, is_packed=is_packed)
    assert choose_placement(engine.blocks, demand, HUGE, True).records_passes == records


def test_memory_goes_where_it_saves_most_time() -> None:
    engine = FusedEngine(model_of("llama"))
    blocks, tokens = engine.blocks, 512
    everything = sum(block.saved_bytes(name, tokens) for block in blocks for name in ACTIVATIONS)
    assert kept(filled(engine, tokens, 64, 0, 0)) == [frozenset(), frozenset()]
    assert kept(filled(engine, tokens, 64, 0, everything + 2)) == [EVERYTHING] * 2
    half = filled(engine, tokens, 64, 0, everything // 2)
    assert half.bytes <= everything // 2
    first, last = kept(half)
    assert len(last) >= len(first)
    rates = {n: blocks[0].recompute_cost(n, tokens, 64) / blocks[0].saved_bytes(n, tokens) for n in ACTIVATIONS}
    assert max(rates, key=lambda name: rates[name]) in last


def streamable() -> FusedEngine:
    return FusedEngine(nf4_model())


def placed(engine: FusedEngine, spare_bytes: int, tokens: int = 4096) -> MemoryPlacement:
    """The placement with so much more memory, or less, than a pass needs that keeps nothing."""
    budget = HUGE // 4
    demand = Demand(tokens, tokens, 0, int(budget * 0.98) - spare_bytes, ends_bytes=engine.ends.bytes)
    return choose_placement(engine.blocks, demand, budget, False)


def test_as_little_as_must_be_is_on_the_host() -> None:
    """Block inputs first, which cost two copies a pass; then as few weights as that takes; all that fits stays."""
    engine = streamable()
    blocks = engine.blocks
    inputs = sum(block.saved_bytes("x", 4096) for block in blocks)
    weights = sum(block_bytes(block.groups) for block in blocks)
    ample = placed(engine, HUGE // 8)
    assert not ample.needs_host
    assert kept(ample) == [EVERYTHING] * len(blocks)
    some = placed(engine, -inputs // 4)
    assert "x" in some.blocks[0].hosted
    assert not some.streams
    streamed = [
        sum(block.streams for block in placed(engine, -inputs // 2 - part).blocks) for part in (weights // 4, 0)
    ]
    assert 0 < streamed[0] < len(blocks)
    assert streamed[1] == 0
    nothing_fits = placed(engine, -HUGE // 8)
    assert all(block.streams and not block.kept for block in nothing_fits.blocks)
    assert nothing_fits.streams_ends


def test_the_copy_of_a_streamed_head_counts_only_where_it_is_the_peak() -> None:
    """A pass that was measured with the head's copy at its peak holds less than that beside the head itself."""
    engine = streamable()
    head, ends = engine.decoder.head.weight.nbytes, engine.ends.bytes
    base = tightest(engine.blocks)
    # Without the copy, the loss takes half a head less than going backward.
    loss, backward, budget = 2**30 + head // 2, 2**30, 2**50
    demand = Demand(64, 64, 0, loss, base=base, ends_bytes=ends, loss_bytes=loss, backward_bytes=backward)
    resident = choose_placement(engine.blocks, demand, budget, False)
    assert not resident.streams_ends
    on_host = choose_placement(engine.blocks, replace(demand, loss_bytes=0, backward_bytes=0), budget, False)
    assert on_host.bytes - resident.bytes == head // 2


def test_a_placement_says_what_each_choice_takes() -> None:
    engine = streamable()
    found = placed(engine, -sum(block.saved_bytes("x", 4096) for block in engine.blocks) // 2)
    on_host = {choice.tensor: choice.host_bytes for choice in found.choices if choice.host_bytes}
    assert sum(on_host.values()) == found.host_bytes > 0
    assert on_host["x"] == sum(b.saved_bytes("x", 4096) for b, p in zip(engine.blocks, found.blocks) if "x" in p.hosted)
    assert found == placed(engine, -sum(block.saved_bytes("x", 4096) for block in engine.blocks) // 2)


def test_memory_that_runs_out_is_answered_by_tighter_placements_with_the_same_numbers() -> None:
    engine, batch = streamable(), batch_of()

    def passed() -> tuple[float, list[float]]:
        engine.master.grad = None
        loss = engine.forward_backward(batch, LIKELIHOOD).loss.item()
        gradient: Any = engine.master.grad
        return loss, gradient.tolist()

    wanted = passed()
    tokens = 4096
    demand = Demand(tokens, tokens, 0, 2**28, ends_bytes=engine.ends.bytes)
    engine._demand = demand
    everything = sum(block.saved_bytes(name, tokens) for block in engine.blocks for name in ACTIVATIONS)
    engine.apply(choose_placement(engine.blocks, demand, 2**28 + 2 * everything, False))
    before, said = engine.placement, []
    assert kept(before) == [EVERYTHING] * len(engine.blocks)
    while (change := engine.tighten()) is not None:
        said.append(change)
        assert engine.placement.bytes < before.bytes
        before = engine.placement
        assert passed() == wanted
    assert len(said) > 3
    assert engine.placement.streams, "in the end weights are on the host too"


ALL = "attention gate_up mid qkv"
# By tenths of what all activations take: what the first block keeps, what the last, and the bytes of both.
CHOICES: dict[str, dict[int, tuple[str, str, int]]] = {
    "llama": {
        1: ("", "attention", 2_228_224),
        3: ("attention mid", "attention mid", 8_912_896),
        5: ("attention mid", "attention mid qkv", 14_024_704),
        8: ("attention gate_up mid", "attention gate_up mid", 27_262_976),
        10: ("attention gate_up mid", ALL, 32_374_784),
        15: (ALL, ALL, 37_486_592),
    },
    "gemma2": {
        1: ("", "", 0),
        3: ("", "attention qkv", 720_896),
        5: ("", "attention gate_up qkv", 1_294_336),
        8: ("gate_up qkv", ALL, 2_490_368),
        10: ("gate_up mid qkv", ALL, 2_793_472),
        15: (ALL, ALL, 3_194_880),
    },
}


@pytest.mark.parametrize(("family", "rows", "length"), [("llama", 4, 2048), ("gemma2", 1, 512)])
def test_choices_are_what_they_were(family: str, rows: int, length: int) -> None:
    blocks = FusedEngine(model_of(family)).blocks
    tokens = rows * length
    everything = sum(block.saved_bytes(name, tokens) for block in blocks for name in ACTIVATIONS)
    for tenths, (first, last, size) in CHOICES[family].items():
        demand = Demand(tokens, length, rows, everything - int(tenths / 10 * everything))
        found = choose_placement(blocks, demand, everything, False)
        assert kept(found) == [set(first.split()), set(last.split())], tenths
        assert found.bytes == size


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
    peaks = chain((7, 9) if varies else (7,), repeat(9))  # from the third on those of the fullest batch as it is placed
    monkeypatch.setattr(FusedEngine, "on_gpu", True)
    monkeypatch.setattr(FusedEngine, "_peak_of", lambda self, compute: compute() or next(peaks))
    monkeypatch.setattr(FusedEngine, "_pass", lambda self, inputs, depth: seen.append(inputs.documents.is_even))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    found = engine.plan_within(BatchShapes((64, 64), varies), 2**20)
    assert seen[:3] == ([True, False, False] if varies else [True, True, True])
    assert found.peak_bytes == 9
    assert found.budget_bytes == 2**20


def corrected(monkeypatch: pytest.MonkeyPatch, *measured: float) -> tuple[MemoryPlacement, int]:
    """The placement within twice what everything takes, and its number of tries; peaks are shares of that budget."""
    engine = FusedEngine(model_of("llama"))
    budget = 2 * sum(block.saved_bytes(name, 128) for block in engine.blocks for name in ACTIVATIONS)
    tries = list[tuple[int, ...]]()

    def peaks_of(engine: FusedEngine, lengths: tuple[int, ...]) -> tuple[int, int]:
        tries.append(lengths)
        return 0, int(measured[len(tries) - 1] * budget)

    monkeypatch.setattr(FusedEngine, "on_gpu", True)
    monkeypatch.setattr(FusedEngine, "_try", peaks_of)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    return engine.plan_within(BatchShapes((64, 64), False), budget), len(tries)


def test_memory_that_a_placement_leaves_over_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    before, tries = corrected(monkeypatch, 0.8, 0.965)
    assert tries == 2  # it needs about as much as was predicted
    after, tries = corrected(monkeypatch, 0.8, 0.85, 0.95)
    assert tries == 3
    assert after.bytes > before.bytes
    assert after.peak_bytes == int(0.95 * after.budget_bytes)


def test_a_placement_that_needs_more_than_predicted_is_tightened(monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = corrected(monkeypatch, 0.8, 0.965)
    after, tries = corrected(monkeypatch, 0.8, 1.01, 0.9)
    assert tries == 3  # and what is left over then is not filled again
    assert after.bytes < before.bytes
    assert after.peak_bytes == int(0.9 * after.budget_bytes)


def test_attention_gets_its_workspace_before_anything_is_kept() -> None:
    engine = FusedEngine(model_of("llama"))
    heads, rows, length = engine.decoder.heads, 64, 4096
    usual = Call.of(rows, length, heads, WORKSPACE_BYTES).workspace_bytes(length)
    whole = Call(rows, heads).workspace_bytes(length)
    tokens = rows * length
    ample = filled(engine, tokens, length, rows, HUGE)
    assert ample.workspace_bytes == whole
    assert ample.bytes - (whole - usual) == filled(engine, tokens, length, 0, HUGE).bytes
    assert kept(ample) == [EVERYTHING] * 2

    tight = filled(engine, tokens, length, rows, whole)
    assert usual < tight.workspace_bytes < whole
    assert tight.workspace_bytes - usual <= whole // 2
    assert tight.workspace_bytes - usual <= tight.bytes <= whole

    for none in (filled(engine, tokens, length, rows, 0), filled(engine, tokens, length, 0, HUGE)):
        assert none.workspace_bytes == WORKSPACE_BYTES


def test_a_placement_is_printed_block_by_block_and_those_alike_together() -> None:
    engine = FusedEngine(model_of("llama"))
    some = block_placement({"qkv"}, {"down"})
    placement = replace(uniform(engine.blocks), blocks=(some, some, block_placement(ACTIVATIONS)), bytes=5)
    states = dict.fromkeys(ACTIVATIONS, "recompute") | {"qkv": "keep", "x": "keep"}
    assert json.loads(json.dumps(placement.as_dict())) == {
        "blocks": [
            {"first": 0, "count": 2, "activations": states, "weights": {"down": "dequantized"}},
            {"first": 2, "count": 1, "activations": dict.fromkeys((*ACTIVATIONS, "x"), "keep"), "weights": {}},
        ],
        "workspace_bytes": WORKSPACE_BYTES,
        "records_passes": False,
        "bytes": 5,
        "least_bytes": 0,
        "budget_bytes": 0,
        "streams_ends": False,
        "host_bytes": 0,
        "link_seconds": 0.0,
        "choices": [],
        "peak_bytes": 0,
    }


def shown_placement(placement: dict[str, Any]) -> list[str]:
    """The lines printed of a placement, on a terminal of 80 columns, with one space between words."""
    shown = StringIO()
    show_placement(Console(file=shown, width=80), placement)
    lines = shown.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    return [" ".join(line.split()) for line in lines if line.strip(" ─╶╴")]


def test_a_plan_says_in_how_many_blocks_a_tensor_is_kept() -> None:
    some, all_of_it = block_placement({"qkv"}, {"down"}), block_placement(ACTIVATIONS)
    lines = shown_placement(MemoryPlacement((some, some, all_of_it), bytes=2**30).as_dict())
    assert lines[0] == "placement, 1.00 GiB more than with nothing kept; times of a micro-batch"
    assert lines[2:] == [
        "block inputs keep 3",
        "q k v keep 3",
        "attention keep 1, recompute 2",
        "mid keep 1, recompute 2",
        "gate and up keep 1, recompute 2",
        "4-bit weights dequantized 2",
    ]
    assert shown_placement(ReferenceEngine(model_of("llama")).plan_memory(BatchShapes((8,)), True, 0).as_dict()) == []


def test_a_plan_says_what_each_choice_takes_and_saves() -> None:
    made_up = [
        ("embedding and head", "streamed", 1, 2**29, 2**30, -0.02),
        ("4-bit weights", "streamed", 30, 2**28, 3 * 2**30, 0.0),
        ("x", "host", 31, 2**27, 7 * 2**30, 0.0),
        ("attention", "recompute", 20, 0, 0, 0.0),
        ("attention", "keep", 12, 3 * 2**29, 0, 1.254),
        ("[scales]", "keep", 32, 2**27, 0, 0.0124),
    ]
    names = ("tensor", "state", "blocks", "bytes", "host_bytes", "seconds")
    choices = [dict(zip(names, values, strict=True)) for values in made_up]
    weights = [{"activations": {}, "weights": {"qkv": state}, "count": n} for state, n in (("nf4", 2), ("streamed", 3))]
    lines = shown_placement({"blocks": weights, "choices": choices, "bytes": -(2**31)})
    assert lines[0] == "placement, 2.00 GiB less than with nothing kept; times of a micro-batch"
    assert lines[1] == "tensors blocks GPU host saves"
    assert lines[2:] == [
        "block inputs host 31 0.12 GiB 7.00 GiB",
        "attention keep 12, recompute 20 1.50 GiB 1.25 s",
        "4-bit weights nf4 2, streamed 30 0.25 GiB 3.00 GiB",
        "embedding and head streamed 1 0.50 GiB 1.00 GiB -20 ms",
        "[scales] keep 32 0.12 GiB 12 ms",
        "in all 2.50 GiB 11.00 GiB 1.25 s",
    ]


def test_a_budget_limits_what_is_kept_beside_what_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FusedEngine(model_of("llama"))
    free, reserved, later = 50, 20, 7
    budgets: list[int] = []
    monkeypatch.setattr(FusedEngine, "on_gpu", True)
    monkeypatch.setattr(FusedEngine, "plan_within", lambda self, shapes, budget: budgets.append(budget))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    for budget in (None, 40, 1000):
        engine.plan_memory(BatchShapes((8,)), "auto", later, budget)
    assert budgets == [free + reserved - later, 40 - later, free + reserved - later]


@pytest.mark.parametrize(("setting", "state"), [(True, "recompute"), ("auto", "recompute"), (False, "keep")])
def test_the_reference_engine_recomputes_every_block_or_none(setting: Any, state: str) -> None:
    engine = ReferenceEngine(model_of("llama"))
    found = engine.plan_memory(BatchShapes((8,)), setting, 0)
    assert [dict(block.activations) for block in found.blocks] == [{"activations": state}] * 2
    assert found.bytes == 0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adamw_32bit"])
def test_what_is_reserved_for_the_optimizer_is_what_it_keeps(
    optim: str, tmp_path: Path, tiny_model: Any, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 bytes a parameter and the scales of its blocks where states are in 8 bits, 8 where they are in 32."""
    reserved: list[int] = []
    plan_memory = ReferenceEngine.plan_memory

    def hears(
        self: ReferenceEngine,
        shapes: BatchShapes,
        setting: bool | str,
        later_bytes: int,
        budget_bytes: int | None,
        rates: Rates,
    ) -> MemoryPlacement:
        assert budget_bytes is None, "the budget is auto"
        reserved.append(later_bytes)
        return plan_memory(self, shapes, setting, later_bytes)

    monkeypatch.setattr(ReferenceEngine, "plan_memory", hears)
    train = {"optim": optim, "max_steps": 1}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    job = TrainingJob(tiny_run(tiny_model(), path, tmp_path / "run", train=train, adapter={"r": 64}))
    job.fit()
    states = [state for of in job._loop._optimizer.state.values() for state in of.values()]
    kept = {state.data_ptr(): state for state in states if isinstance(state, torch.Tensor)}
    assert reserved == [sum(rounded(state.numel() * state.element_size()) for state in kept.values())]
