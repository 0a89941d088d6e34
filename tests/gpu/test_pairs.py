"""Prompts that go through the model once, on a GPU: attention's kernels, recorded passes, errors against float32."""

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.gpu.test_fused import WIDE
from tests.support.engines import gradients, model_of, worst
from tests.support.exactness import in_16_bits
from tests.support.offload import OFFLOADS, RESIDENT, assert_same, course, nf4_model, placement_of
from tests.support.preference import step
from tests.support.shared_prompts import PAIRS, Lengths, once, twice
from veneer.data.batch import Batch
from veneer.engine.fused import flash4
from veneer.engine.fused.attention import Attention, _plain, attend, attend_backward
from veneer.engine.fused.documents import Documents
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.graphs import Inputs
from veneer.engine.interface import document_losses
from veneer.engine.reference import ReferenceEngine
from veneer.kernels.rope import Heads, split_heads
from veneer.training.objectives import DirectPreference

pytestmark = pytest.mark.gpu

BACKENDS = ["flash", "flash4"]
# Answers far shorter and far longer than prompts, of one token, at and off the borders of the kernels' blocks.
LONG: Lengths = ((700, 130, 1), (1200, 90, 340), (3, 900, 515), (128, 128, 128), (1, 70, 40), (2047, 1, 300))


class Forced(Attention):
    """Attention through flash, whatever the rule says."""

    def backend(self, documents: Documents, like: torch.Tensor) -> str:
        return "flash"


class Forced4(Attention):
    """The same through FlashAttention-4."""

    def backend(self, documents: Documents, like: torch.Tensor) -> str:
        return "flash4"


def forced(backend: str, kind: Attention) -> Attention:
    if backend == "flash4" and not flash4.takes(kind.heads.size, torch.cuda.get_device_capability()[0]):
        pytest.skip("flash-attn-4 is not installed, or not for this GPU")
    return (Forced if backend == "flash" else Forced4)(*kind)


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(8, 8, 64), Heads(9, 3, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernels_attend_as_plain_attention_does(backend: str, heads: Heads, window: int, pads: bool) -> None:
    kind = forced(backend, Attention(heads, heads.size**-0.5, window, 0.0))
    inputs = Inputs.of(once(LONG), torch.device("cuda"), None, pads)
    documents, generator = inputs.documents, torch.Generator("cuda").manual_seed(0)
    keys = documents.keys
    assert keys is not None
    width = (heads.query + 2 * heads.key) * heads.size
    qkv, dout = (
        torch.randn((len(inputs.ids_T), n), dtype=torch.bfloat16, device="cuda", generator=generator)
        for n in (width, heads.query * heads.size)
    )
    out, saved = attend(qkv, documents, kind)
    found = attend_backward(dout, qkv, saved, documents, kind)

    exact = qkv.float().requires_grad_()
    q, k, v = split_heads(exact, heads)
    # Autograd adds the gradients of a key and of its copies.
    wanted = _plain(q, k[keys.source_S], v[keys.source_S], documents, kind).flatten(1)
    (gradient,) = torch.autograd.grad(wanted, exact, dout.float())
    assert relative(out, wanted.detach()) < 5e-3
    for got, right in zip(found, split_heads(gradient, heads), strict=True):
        assert got.isfinite().all()
        assert relative(got, right) < 1e-2
    for _ in range(3):
        again, state = attend(qkv, documents, kind)
        assert torch.equal(again, out)
        repeated = attend_backward(dout, qkv, state, documents, kind)
        assert all(torch.equal(one, other) for one, other in zip(repeated, found, strict=True))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "phi3"])
def test_in_float32_once_is_twice(family: str) -> None:
    model, batch = model_of(family).cuda(), once()
    engine = FusedEngine(model)
    assert engine.shares_prompts
    loss, found = gradients(engine, model, batch)
    wanted_loss, wanted = gradients(engine, model, twice(batch))
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    assert worst(found, wanted)[0] < 5e-3, worst(found, wanted)
    assert document_losses(engine, batch) == pytest.approx(document_losses(engine, twice(batch)), rel=1e-3)


@pytest.mark.parametrize("pairs", [PAIRS, ((300, 60, 90), (40, 300, 20), (700, 64, 64))])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_bfloat16_errs_at_most_twice_as_much_as_peft(family: str, pairs: Lengths) -> None:
    """Over six models and batches together, as tests/gpu/test_fused.py has it of single documents."""
    changes = {"hidden_size": 128, "max_position_embeddings": 2048}
    errors: list[dict[str, tuple[float, ...]]] = []
    for seed in range(6):
        exact, batch = model_of(family, seed, changes=changes).cuda(), once(pairs, seed)
        loss, wanted = gradients(ReferenceEngine(exact), exact, twice(batch))
        peft, fused = in_16_bits(exact), in_16_bits(exact)
        if not getattr(exact.config, "attn_logit_softcapping", None):
            peft.set_attn_implementation("sdpa")
        with torch.autocast("cuda", torch.bfloat16):
            peft_loss, by_peft = gradients(ReferenceEngine(peft), peft, twice(batch))
        found_loss, found = gradients(FusedEngine(fused), fused, batch)
        assert abs(found_loss - loss) <= max(2 * abs(peft_loss - loss), 2e-3 * loss)
        errors.append({n: tuple(relative(some[n], wanted[n]) for some in (by_peft, found)) for n in wanted})

    def size(name: str, who: int) -> float:
        return math.sqrt(statistics.fmean(one[name][who] ** 2 for one in errors))

    ratios = {name: size(name, 1) / size(name, 0) for name in errors[0]}
    assert {name: ratio for name, ratio in ratios.items() if ratio > 2} == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_replayed_pairs_are_equal_bit_for_bit(backend: str) -> None:
    """Batches of one shape with other prompts and answers replay one recorded pass."""
    model = model_of("llama", changes=WIDE).cuda().bfloat16()
    plain, recording = FusedEngine(model, graphs=False), FusedEngine(model)
    for engine in (plain, recording):
        for block in engine.blocks:
            block.attention = forced(backend, block.attention)
    shapes = set()
    for seed, pairs in enumerate((LONG, LONG, ((701, 129, 1), *LONG[1:]), ((600, 230, 1), *LONG[1:]), LONG, PAIRS)):
        batch = once(pairs, seed % 4).scaled(1 / 6)
        shapes.add(Inputs.of(batch, torch.device("cuda"), None, pads=True).size)
        launched, wanted = step(plain, model, [batch], DirectPreference(0.1))
        replayed, found = step(recording, model, [batch], DirectPreference(0.1))
        assert replayed.loss == launched.loss
        assert launched.loss.isfinite()
        assert replayed.weight == launched.weight == len(pairs)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), worst(found, wanted)
        assert torch.equal(plain.token_logprobs(batch), recording.token_logprobs(batch))
    assert recording._graphs is not None
    assert recording._graphs._recorded
    assert len(shapes) < 5


def test_pairs_made_again_or_on_the_host_are_equal_bit_for_bit() -> None:
    def pair_course(offload: Any, graphs: bool) -> Any:
        engine = FusedEngine(nf4_model(device="cuda", dtype=torch.bfloat16, changes=WIDE), graphs=graphs)
        engine.apply(placement_of(engine, offload))
        return course(engine, steps, make=once)

    steps: Any = ((LONG,), (LONG, LONG[1:4], LONG), (PAIRS, LONG, LONG))
    wanted = pair_course(RESIDENT, False)
    for name in ("nothing kept", "x and attention on the host", "all on the host", "everything at once"):
        for graphs in (False, True):
            assert_same(pair_course(OFFLOADS[name], graphs), wanted)


def test_a_prompt_that_is_computed_once_takes_less_memory() -> None:
    model = model_of("llama", changes=WIDE).cuda().bfloat16()
    engine = FusedEngine(model, graphs=False)
    batch: Batch = once(((3000, 200, 200), (3000, 300, 100)))
    peaks = []
    for some in (batch, twice(batch)):
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            gradients(engine, model, replace(some))
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < 0.7 * peaks[1], peaks
