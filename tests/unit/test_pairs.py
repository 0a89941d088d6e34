"""A pair's prompt goes through the fused engine once, and losses and gradients are those of two whole documents.

In float32 both sum the same numbers in other orders, over rows of at most some 60 tokens and two layers: a few units of
the last place (6e-8) each, so 1e-5 is far above them, and far below what any lost or misplaced key makes (1e-2).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import veneer
from tests.support.engines import gradients, model_of, worst
from tests.support.exactness import in_16_bits
from tests.support.offload import OFFLOADS, RESIDENT, Step, assert_same, course, nf4_model, placement_of
from tests.support.preference import step
from tests.support.runs import tiny_run, write_rows
from tests.support.shared_prompts import PAIRS, examples_of, once, twice
from veneer.config import JobError, Run, RunFolder, Train
from veneer.data.batch import UNTRAINED, Batch, Batches, Example, shared_in_rows
from veneer.engine.choose import choose
from veneer.engine.fused.attention import Attention, attend, attend_backward
from veneer.engine.fused.block import ACTIVATIONS
from veneer.engine.fused.documents import Documents, Keys
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.graphs import Inputs, PassShape
from veneer.engine.fused.policy import uniform
from veneer.engine.interface import BatchShapes, document_losses
from veneer.engine.reference import ReferenceEngine
from veneer.kernels.rope import Heads
from veneer.planning.batch_shapes import Lengths, rows_of
from veneer.training.metrics import read_metrics
from veneer.training.objectives import DirectPreference

FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "phi3"]  # mistral and gemma2 have windows of 16 tokens
CPU = torch.device("cpu")


def example(ids: Sequence[int], first: int) -> Example:
    return Example(np.array(ids, np.int32), ((first, len(ids), 1.0),), "")


def test_what_a_pair_shares_ends_before_the_last_token_that_both_have() -> None:
    pair = [example([1, 2, 3, 4, 5], 3), example([1, 2, 3, 7], 3)]
    assert shared_in_rows(pair, 2) == (0, 2)
    batch = Batch.of(pair, 2)
    own = batch.without_shared()
    assert (batch.tokens, batch.computed, own.lengths, own.shared) == (7, (5, 2), (5, 2), ())
    assert own.ids_T.tolist() == [1, 2, 3, 4, 5, 3, 7]
    assert own.targets_T.tolist() == [UNTRAINED, UNTRAINED, 4, 5, UNTRAINED, 7, UNTRAINED]
    assert (own.trained, own.weight) == (batch.trained, batch.weight)


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        (example([1, 2, 3, 4, 5], 3), example([1, 2, 3, 4, 9], 3), 2),  # answers that begin alike are trained each
        (example([1, 2, 3, 4, 5], 4), example([1, 2, 3, 4, 9], 2), 1),
        (example([1, 2, 3], 1), example([1, 7, 8], 1), 0),
        (example([1, 2, 3], 2), example([7, 2, 3], 2), 0),  # prompts differ from the first token on
        (Example(np.array([1, 2, 3], np.int32), (), ""), Example(np.array([1, 2, 3, 4], np.int32), (), ""), 2),
    ],
)
def test_nothing_that_is_trained_is_left_out(chosen: Example, rejected: Example, shared: int) -> None:
    batch = Batch.of([chosen, rejected], 2)
    assert batch.shared == (0, shared)
    left_out = batch.targets_T[len(chosen.ids) :][:shared]
    assert (left_out == UNTRAINED).all()
    assert batch.without_shared().trained == batch.trained == chosen.trained + rejected.trained


def test_batches_count_and_cut_by_the_tokens_that_go_through_the_model() -> None:
    batch = once(((40, 1, 1), (2, 5, 5), (2, 25, 25)))
    first, second = batch.halved()
    assert (first.computed, second.computed) == ((41, 2, 7, 6), (27, 26))
    assert (first.tokens, second.tokens, batch.tokens) == (56, 53, 109)
    assert [half.rows for half in twice(batch).halved()] == [1, 2]
    assert torch.equal(torch.cat([first.ids_T, second.ids_T]), batch.ids_T)
    assert [half.shared for half in first.halved()] == [(0, 39), (0, 1)]

    examples = examples_of()
    lengths = np.array([len(one.ids) for one in examples])
    some = Batches(examples, lengths, 2, 1, 0, None, 2, np.array(shared_in_rows(examples, 2)))
    whole = Batches(examples, lengths, 2, 1, 0, None, 2)
    assert some.sizes.tolist() == [41, 56, 23, 13]
    assert whole.sizes.tolist() == [69, 59, 34, 13]
    assert [batch.tokens for batch in some.largest()] == [97]
    assert not whole.batch_of([0, 1]).shared


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_once_is_twice(family: str, pads: bool) -> None:
    model, batch = model_of(family), once()
    engine = FusedEngine(model)
    engine._pads = pads
    assert engine.shares_prompts
    assert (batch.tokens, twice(batch).tokens) == (133, 175)
    loss, found = gradients(engine, model, batch)
    for other in (engine, ReferenceEngine(model)):
        wanted_loss, wanted = gradients(other, model, twice(batch))
        limit = 1e-5 if other is engine else 1e-4
        assert loss == pytest.approx(wanted_loss, rel=limit)
        assert worst(found, wanted)[0] < limit, worst(found, wanted)
        assert document_losses(engine, batch) == pytest.approx(document_losses(other, twice(batch)), rel=limit)


@pytest.mark.parametrize("engine", ["reference", "fused", "fused, padded"])
def test_an_objective_sees_the_same_documents(engine: str) -> None:
    model, batch = model_of("qwen3"), once().scaled(0.25)
    made: Any = ReferenceEngine(model) if engine == "reference" else FusedEngine(model)
    made._pads = "padded" in engine
    output, found = step(made, model, [batch], DirectPreference(0.3))
    wanted_output, wanted = step(ReferenceEngine(model), model, [twice(batch)], DirectPreference(0.3))
    assert output.weight == wanted_output.weight == 4
    assert output.loss.item() == pytest.approx(wanted_output.loss.item(), rel=1e-4)
    for name, value in wanted_output.metrics.items():
        assert output.metrics[name].item() == pytest.approx(value.item(), rel=1e-4)
    assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_in_bfloat16_once_errs_no_more_than_twice(family: str) -> None:
    """Against float32, over four batches: a key that serves two documents is rounded once more, no oftener."""
    squares = np.zeros(2)
    for seed in range(4):
        exact, batch = model_of(family, seed), once(seed=seed)
        loss, wanted = gradients(FusedEngine(exact), exact, twice(batch))
        for way, some in enumerate((batch, twice(batch))):
            rounded = in_16_bits(exact)
            found_loss, found = gradients(FusedEngine(rounded), rounded, some)
            assert found_loss == pytest.approx(loss, rel=1e-2)
            error = sum((found[name] - wanted[name]).square().sum().item() for name in wanted)
            squares[way] += error / sum(value.square().sum().item() for value in wanted.values())
    errors = np.sqrt(squares / 4)
    assert errors[0] < 1.5 * errors[1], errors
    assert errors[1] < 0.1


def test_a_lost_gradient_of_the_copies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), once()
    _, wanted = gradients(FusedEngine(model), model, twice(batch))
    monkeypatch.setattr(Keys, "add_copies", lambda keys, gradient: gradient[keys.own_T])
    _, found = gradients(FusedEngine(model), model, batch)
    apart = {name: ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}
    assert min(error for name, error in apart.items() if "layers.0" in name and "_proj" in name) > 1e-2, apart


def test_keys_of_another_document_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), once()
    wanted = document_losses(FusedEngine(model), twice(batch))
    of = Keys.of

    def planted(*arguments: Any) -> Keys:
        keys = of(*arguments)
        return keys._replace(source_S=torch.where(keys.source_S < 29, 0, keys.source_S))

    monkeypatch.setattr(Keys, "of", planted)
    found = document_losses(FusedEngine(model), batch)
    assert abs(found[1] - wanted[1]) > 1e-2
    assert found[3] == pytest.approx(wanted[3], rel=1e-5), "of another pair"


def test_where_documents_have_their_own_angles_the_prompt_is_computed_twice() -> None:
    """Phi-3's longrope: one answer of a pair may be beyond the length of the first table."""
    model, batch = model_of("phi3", changes=longrope()), once(((20, 8, 30), (20, 4, 6), (30, 9, 12)))
    engine = FusedEngine(model)
    inputs = engine._to_device(batch, True)
    assert inputs.documents.keys is not None
    assert inputs.documents.lengths == (28, 50, 24, 7, 39, 13)
    wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
    loss, found = gradients(engine, model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)


def longrope() -> dict[str, Any]:
    rope = {
        "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": torch.linspace(1.0, 3.0, 8).tolist(),
        "rope_theta": 10000.0, "original_max_position_embeddings": 32, "factor": 8.0,
    }  # fmt: skip
    lengths = {"max_position_embeddings": 256, "original_max_position_embeddings": 32}
    return {**lengths, "rope_parameters": rope}


def test_where_attention_has_no_other_bounds_for_keys_both_documents_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's masks have none."""
    monkeypatch.setattr(Attention, "shares_keys", lambda kind, like: False)
    model, batch = model_of("gemma2"), once()
    engine = FusedEngine(model)
    assert not engine.shares_prompts
    assert engine._to_device(batch, True).documents.keys is None
    loss, found = gradients(engine, model, batch)
    wanted_loss, wanted = gradients(engine, model, twice(batch))
    assert loss == wanted_loss
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_what_is_kept_changes_no_bit(family: str) -> None:
    batch, results = once(), []
    for keep in (ACTIVATIONS, (), ("attention",), ("qkv", "mid"), ("mid", "gate_up")):
        model = model_of(family)
        engine = FusedEngine(model)
        engine.apply(uniform(engine.blocks, keep))
        results.append(gradients(engine, model, batch))
    for loss, found in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(found[name], results[0][1][name]) for name in found)


STEPS: Any = ((PAIRS,), (PAIRS[:2], PAIRS[1:3], PAIRS), (((64, 30, 20),), PAIRS[:2]))


@cache
def resident(dropout: float) -> list[Step]:
    return pair_course("resident", dropout)


def pair_course(name: str, dropout: float) -> list[Step]:
    engine = FusedEngine(nf4_model(lora_dropout=dropout))
    engine.apply(placement_of(engine, OFFLOADS.get(name, RESIDENT)))
    return course(engine, STEPS, make=once)


@pytest.mark.parametrize(
    ("name", "dropout"), [*((name, 0.3) for name in OFFLOADS), ("nothing kept", 0.0), ("everything at once", 0.0)]
)
def test_a_placement_changes_no_bit(name: str, dropout: float) -> None:
    assert_same(pair_course(name, dropout), resident(dropout))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 1, 10, 200])
def test_attention_to_gathered_keys_is_that_of_whole_documents(window: int, softcap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, kind = once(), Attention(Heads(4, 2, 16), 0.25, window, softcap)
    inputs = Inputs.of(batch, CPU, None, pads=False)
    keys = inputs.documents.keys
    assert keys is not None
    qkv_TN = torch.randn(batch.tokens, 128, generator=generator)
    whole_SN = qkv_TN[keys.source_S]
    is_own_S = torch.zeros(len(whole_SN), dtype=torch.bool).index_fill_(0, keys.own_T, True)
    out, saved = attend(qkv_TN, inputs.documents, kind)
    wanted, wanted_saved = attend(whole_SN, Documents.of(batch.lengths, CPU), kind)
    torch.testing.assert_close(out, wanted[is_own_S])
    dout = torch.randn(out.shape, generator=generator)
    found = attend_backward(dout, qkv_TN, saved, inputs.documents, kind)
    whole_dout = torch.zeros_like(wanted).masked_scatter(is_own_S[:, None], dout)
    dq, dk, dv = attend_backward(whole_dout, whole_SN, wanted_saved, Documents.of(batch.lengths, CPU), kind)
    torch.testing.assert_close(found[0], dq[is_own_S])
    for gradient, whole in zip(found[1:], (dk, dv), strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient).index_add_(0, keys.source_S, whole))


def test_recorded_passes_have_one_shape_whatever_is_shared() -> None:
    """All that differs between two batches of a shape is in tensors of one size."""
    batches = [once(pairs, seed) for seed, pairs in enumerate((((300, 40, 9),) * 3, ((290, 30, 40), (310, 33, 3))))]
    shapes = []
    for batch in batches:
        inputs = Inputs.of(batch, CPU, None, pads=True)
        keys = inputs.documents.keys
        assert keys is not None
        size = inputs.size
        assert len(inputs.ids_T) == len(keys.own_T) == len(inputs.documents.position_T) == size.tokens
        assert len(keys.source_S) == size.keys >= size.tokens + sum(batch.shared)
        assert len(inputs.documents.bounds) == len(keys.bounds) == size.documents + 1
        assert keys.bounds[-1] == size.tokens + sum(batch.shared)
        assert keys.bounds.diff().max() <= size.longest == inputs.documents.longest
        copy = inputs.cloned()
        assert copy.size == size
        assert all(torch.equal(a, b) and a is not b for a, b in zip(copy.tensors, inputs.tensors, strict=True))
        shapes.append([tensor.shape for tensor in inputs.tensors])
    assert PassShape.of((256,) * 4, 8, (0, 100) * 2).keys
    assert PassShape.of((256,) * 4, 8, (0, 0) * 2) == PassShape.of((256,) * 4, 8)
    other = Inputs.of(once(((299, 41, 9),) * 3, 7), CPU, None, pads=True)
    assert [tensor.shape for tensor in other.tensors] == shapes[0]


@pytest.mark.parametrize("backend", ["flash", "flash4"])
@pytest.mark.parametrize("keys", [2, 4])
def test_a_dry_run_takes_shared_prompts(backend: str, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "backend", lambda *_: backend)
    kind, batch = Attention(Heads(4, keys, 16), 0.25, 0, 0.0), once()
    inputs = Inputs.of(batch, torch.device("meta"), None, pads=True)
    qkv_TN = torch.empty((inputs.size.tokens, (4 + 2 * keys) * 16), dtype=torch.bfloat16, device="meta")
    out, saved = attend(qkv_TN, inputs.documents, kind)
    assert out.shape == (inputs.size.tokens, 64)
    grads = attend_backward(torch.empty_like(out), qkv_TN, saved, inputs.documents, kind)
    assert [gradient.shape[1] for gradient in grads] == [4, keys, keys]
    assert {len(gradient) for gradient in grads} == {inputs.size.tokens}


def test_a_plan_counts_what_goes_through_the_model() -> None:
    rng = np.random.default_rng(0)
    drawn = [(40 + int(p), int(c), int(r)) for p, c, r in rng.integers(1, 120, (60, 3))]
    examples = examples_of(tuple(drawn))
    tokens = np.array([len(one.ids) for one in examples])
    shared = np.array(shared_in_rows(examples, 2))
    rows = Lengths(tokens, np.array([one.trained for one in examples]), shared)
    run = run_of(200)
    found = rows_of(run, "fused", rows, rows, 2)
    whole = rows_of(run, "fused", rows.without_shared(), rows.without_shared(), 2)
    kept = rows.within(run, 2)
    assert 0 < len(kept.tokens) < len(tokens), "pairs with one answer beyond the limit are left out whole"
    assert (kept.tokens <= 200).all()
    assert len(kept.tokens) % 2 == 0
    batches = Batches([], kept.tokens, 4, 1, 0, None, 2, kept.shared)
    largest = int(np.sort(batches.sizes)[-4:].sum())
    assert largest <= found.fullest.rows * found.fullest.length < 1.02 * largest
    in_step = 4 * run.train.gradient_accumulation_steps
    assert found.tokens == pytest.approx(in_step * batches.sizes.mean())
    assert whole.tokens == pytest.approx(found.tokens + 2 * in_step * kept.shared.mean())
    assert not found.even
    assert (found.steps, found.passes) == (whole.steps, whole.passes)
    assert found.held_out is not None
    assert whole.held_out is not None
    assert found.held_out.rows * found.held_out.length < whole.held_out.rows * whole.held_out.length
    one = Lengths(np.array([1200, 1300]), np.array([200, 300]), np.array([0, 999]))
    assert rows_of(run_of(2000), "fused", one, one, 2).fullest == (1, 1501, 500)


def run_of(max_length: int) -> Run:
    return Run.model_validate(
        {
            "model": {"base": "-"},
            "data": {"train": "-", "max_length": max_length},
            "train": {"output_dir": "-", "per_device_train_batch_size": 4},
        }
    )


@pytest.mark.parametrize("has_pairs", [False, True])
def test_an_engine_is_checked_on_pairs_before_it_trains_them(has_pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = examples_of(((40, 30, 30),) * 6)
    choose(model_of("llama"), Train(output_dir=Path("-"), engine="fused"), "cpu", examples, has_pairs)
    monkeypatch.setattr(Keys, "add_copies", lambda keys, gradient: gradient[keys.own_T])
    with pytest.raises(JobError, match="does not give the reference engine's numbers") if has_pairs else nullcontext():
        choose(model_of("llama"), Train(output_dir=Path("-"), engine="fused"), "cpu", examples, has_pairs)


def test_a_run_counts_what_goes_through_its_engine(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    answers = [
        {"prompt": "what does the owl say " * 3, "chosen": word, "rejected": word[1:]} for word in ("hoot", "hu")
    ]
    file = write_rows(tmp_path / "pairs.jsonl", answers * 4)
    counted = {}
    for engine in ("reference", "fused"):
        folder, train = tmp_path / engine, {"engine": engine, "max_steps": 2}
        data = {"duplicates": "keep", "validation": file}
        veneer.train(tiny_run(tiny_model(), file, folder, train=train, data=data))
        counted[engine] = read_metrics(RunFolder(folder).metrics)
    for ours, wanted in zip(counted["fused"], counted["reference"], strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
        assert ours["trained_tokens"] == wanted["trained_tokens"]
        if ours["kind"] == "train":
            assert ours["tokens"] < 0.7 * wanted["tokens"]


def test_memory_is_measured_with_the_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, batch, tried = FusedEngine(model_of("llama")), once(), list[int]()

    def peaks_of(engine: FusedEngine, tried_batch: Batch) -> tuple[int, int]:
        tried.append(engine._to_device(tried_batch, False).ids_T.numel())
        return 0, 1

    monkeypatch.setattr(FusedEngine, "on_gpu", True)
    monkeypatch.setattr(FusedEngine, "_try", peaks_of)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    engine.plan_within(BatchShapes(batch.lengths, varies=True, shared=batch.shared), 2**30)
    assert set(tried) == {batch.tokens}
