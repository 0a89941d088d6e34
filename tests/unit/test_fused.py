"""The fused engine computes what the reference engine computes: losses and every adapter's gradient."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from tests.support.engines import COVERED, batch_of, gradients, model_of, worst
from veneer.config import Adapter, Train
from veneer.data.batch import Batch
from veneer.engine.fused.block import ACTIVATIONS
from veneer.engine.fused.decoder import NotCoveredError
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.graphs import Graphs, Inputs, PassShape, rounded
from veneer.engine.fused.group import Group, Linear
from veneer.engine.fused.policy import uniform
from veneer.engine.interface import BatchShapes, document_losses
from veneer.engine.objective import LIKELIHOOD, Objective, StepOutput
from veneer.engine.placement import MemoryPlacement
from veneer.engine.reference import ReferenceEngine
from veneer.kernels.cast import cast_all, cast_table
from veneer.kernels.rms_norm import rms_norm
from veneer.model.attach import attach
from veneer.training.optimizer import build_optimizer


@pytest.mark.parametrize("family", COVERED)
def test_losses_and_gradients_are_the_references(family: str) -> None:
    model, batch = model_of(family), batch_of()
    wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
    wanted_losses = document_losses(ReferenceEngine(model), batch)
    engine = FusedEngine(model)
    loss, found = gradients(engine, model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)
    torch.testing.assert_close(document_losses(engine, batch), wanted_losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj"], ["gate_proj"], ["k_proj", "up_proj"]]
)
def test_any_subset_of_the_linears_is_adapted(targets: list[str]) -> None:
    model, batch = model_of("qwen2", target_modules=targets, use_rslora=True), batch_of()
    wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
    loss, found = gradients(FusedEngine(model), model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)


def test_small_adapters_count_for_what_they_are_in_16_bits() -> None:
    """Two tensors on bfloat16's grid often add up to the middle between two numbers of it, where a trifle decides."""
    T, D = 2048, 64
    torch.manual_seed(0)
    linear = torch.nn.Linear(D, D, bias=False, dtype=torch.bfloat16)
    a, b = torch.nn.Parameter(torch.randn(4, D)), torch.nn.Parameter(1e-5 * torch.randn(D, 4))
    group = Group((Linear("o", linear, a, b),), torch.bfloat16, 0, torch.device("cpu"), norm_follows=True)
    x, residual = (torch.randn(T, D).bfloat16() for _ in range(2))
    cast_all(cast_table(group.casts()))

    def stream() -> torch.Tensor:
        out = x.new_empty((T, D + group.padding))
        _, update = group.forward(x, group.matrix(x), out, None)
        weight, y = torch.ones(D, dtype=torch.bfloat16), torch.empty_like(residual)
        return rms_norm(residual, out[:, :D], weight, 1e-6, 0.0, y, None, update)[0].float()

    exact = x.float() @ a.T @ b.T
    with_it = stream()
    b.data.neg_()
    cast_all(cast_table(group.casts()))
    found = (with_it - stream()) / 2
    assert ((found * exact).sum() / exact.pow(2).sum()).item() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("family", COVERED)
def test_what_is_kept_changes_no_bit(family: str) -> None:
    batch = batch_of()
    results = []
    for keep in (ACTIVATIONS, (), ("attention",), ("qkv", "mid"), ("mid", "gate_up")):
        model = model_of(family)
        engine = FusedEngine(model)
        engine.apply(uniform(engine.blocks, keep))
        results.append(gradients(engine, model, batch))
    for loss, found in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(found[n], results[0][1][n]) for n in found)


def test_packed_equals_unpacked() -> None:
    model, batch = model_of("llama"), batch_of()
    engine = FusedEngine(model)
    loss, found = gradients(engine, model, batch)
    model.zero_grad()
    total, start = 0.0, 0
    for length in batch.lengths:
        part = slice(start, start + length)
        alone = Batch(batch.ids_T[part], batch.targets_T[part], batch.weights_T[part], (length,), 0, 0.0)
        total += engine.forward_backward(alone.scaled(0.01), LIKELIHOOD).loss.item()
        start += length
    assert total == pytest.approx(loss, rel=1e-6)
    assert worst({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, found)[0] < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_the_mlp_in_pieces_is_the_mlp(family: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(family, lora_dropout=dropout), batch_of((150, 80, 21))
    torch.manual_seed(5)  # of the masks
    loss, wanted = gradients(FusedEngine(model), model, batch)
    monkeypatch.setattr("veneer.engine.fused.block.MLP_TOKENS", 100)
    for checkpointing in (False, True):
        torch.manual_seed(5)
        in_pieces, found = gradients(FusedEngine(model, checkpointing), model, batch)
        assert in_pieces == pytest.approx(loss, rel=1e-6)
        assert worst(found, wanted)[0] < 1e-5, worst(found, wanted)


@pytest.mark.parametrize("rank", [8, 40])
def test_ranks_beyond_what_a_norm_adds_are_added_elsewhere(rank: int) -> None:
    model, batch = model_of("llama", r=rank), batch_of()
    wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
    loss, found = gradients(FusedEngine(model), model, batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_gradient_under_dropout_is_the_slope_of_the_loss(family: str) -> None:
    """With the same masks, the loss changes along a direction as the gradient says."""
    model, batch = model_of(family, lora_dropout=0.3), batch_of()
    engine = FusedEngine(model)

    def loss(seed: int = 5) -> float:
        torch.manual_seed(seed)  # of the masks
        return engine.forward_backward(batch, LIKELIHOOD).loss.item()

    model.zero_grad()
    first = loss()
    assert engine.master.grad is not None
    gradient = engine.master.grad.clone()
    assert loss() == first
    assert loss(seed=6) != first
    direction = torch.randn_like(engine.master)
    direction /= direction.norm()
    engine.master.data += 0.02 * direction
    above = loss()
    engine.master.data -= 0.04 * direction
    below = loss()
    assert (above - below) / 0.04 == pytest.approx((gradient @ direction).item(), rel=0.02, abs=0.02)


def test_long_documents_have_rotary_tables_of_their_own() -> None:
    """Phi-3's longrope: other angles beyond the length it was made for, document by document."""
    factors = torch.linspace(1.0, 3.0, 8).tolist()
    changes = {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": factors, "rope_theta": 10000.0,
            "original_max_position_embeddings": 32, "factor": 8.0,
        },
    }  # fmt: skip
    model = model_of("phi3", changes=changes)
    for lengths in ((60,), (20,), (60, 20), (35, 30, 33)):
        batch = batch_of(lengths)
        wanted_loss, wanted = gradients(ReferenceEngine(model), model, batch)
        loss, found = gradients(FusedEngine(model), model, batch)
        assert loss == pytest.approx(wanted_loss, rel=1e-5), lengths
        assert worst(found, wanted)[0] < 1e-4, worst(found, wanted)


@pytest.mark.parametrize("batches", [((1000, 37, 5), (900, 100, 60), (1001, 17, 30)), ((200,), (211,), (256 - 20,))])
def test_batches_are_padded_to_sizes_that_come_again(batches: tuple[tuple[int, ...], ...]) -> None:
    sizes = set()
    for lengths in batches:
        batch = batch_of(lengths)
        inputs = Inputs.of(batch.scaled(0.5), torch.device("cpu"), None, pads=True)
        sizes.add(inputs.size._replace(trained=0))
        shape = len(inputs.ids_T), len(inputs.documents.bounds) - 1, inputs.documents.longest, len(inputs.index_N)
        assert PassShape(False, *shape) == inputs.size
        real = inputs.targets_N >= 0
        assert torch.equal(inputs.ids_T[: batch.tokens], batch.ids_T)
        assert torch.equal(inputs.targets_N[real], batch.targets_T[batch.targets_T >= 0])
        assert (inputs.factor_N[~real] == 0).all()
        assert not set(inputs.index_N[~real].tolist()) & set(inputs.index_N[real].tolist())
        assert inputs.documents.bounds[len(lengths)] == batch.tokens
    assert len(sizes) == 1


def test_rows_of_whole_blocks_are_left_as_they_are_and_told_from_others() -> None:
    even, uneven = (256,) * 32, (255, 257, *(256,) * 30)
    batch = batch_of(even)
    inputs = Inputs.of(batch, torch.device("cpu"), None, pads=True)
    assert inputs.size == PassShape(True, 8192, 32, 256, inputs.size.trained)
    assert inputs.documents.lengths == even
    assert PassShape.of(uneven, 8192).documents == 32
    everything = PassShape.of(even, 8192)
    assert everything.trained == 8192


def test_the_largest_pass_is_recorded_first_and_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Inputs] = []
    monkeypatch.setattr(Graphs, "_record", lambda self, inputs, objective: recorded.append(inputs))
    engine = FusedEngine(model_of("llama"))
    graphs = Graphs(engine._pass)
    largest = Inputs.of(batch_of((60, 40)), torch.device("cpu"), None, pads=True)
    graphs.reserve(largest, LIKELIHOOD)
    assert recorded == [largest]
    assert graphs.run(largest, LIKELIHOOD).loss > 0, "launched: a shape is recorded the second time that it comes"
    assert len(recorded) == 1


@pytest.mark.parametrize(
    ("lengths", "times", "records", "whole"),
    [
        ((300, 200), 2.5, True, True),  # all is kept, twice
        ((300, 200), 1.5, True, False),  # small passes: less is kept, so that they can be recorded
        ((300, 200), 0.0, True, False),
        ((300, 200), -1.0, False, False),  # there is no room for a second pass
        ((3000, 200), 1.5, False, True),  # large ones: all is kept, and none recorded
    ],
)
def test_small_passes_are_recorded_before_more_is_kept(
    lengths: tuple[int, ...], times: float, records: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Inputs] = []
    monkeypatch.setattr(Graphs, "_record", lambda self, inputs, objective: recorded.append(inputs))
    monkeypatch.setattr(FusedEngine, "on_gpu", True)
    monkeypatch.setattr(FusedEngine, "_peak_of", lambda self, compute: 2**20 + self.placement.bytes)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    engine, unrecordable = FusedEngine(model_of("llama")), FusedEngine(model_of("llama"))
    engine._may_record = True
    tokens = rounded(sum(lengths))
    everything = sum(block.saved_bytes(name, tokens) for block in engine.blocks for name in ACTIVATIONS)
    budget = int((2 * 2**20 + times * everything) / 0.97)
    shapes = BatchShapes(lengths, varies=True, documents=(100,) * 4)
    found, other = (some.plan_within(shapes, budget) for some in (engine, unrecordable))
    assert times <= 0 or keeps_everything(other), "all it can"
    assert found.records_passes == records
    assert not other.records_passes
    assert (len(recorded) == 1) == records
    assert keeps_everything(found) == whole
    assert engine.master.grad is None
    assert torch.equal(engine._to_device(batch_of((40, 30)), True).ids_T[:70], batch_of((40, 30)).ids_T)


def keeps_everything(placement: MemoryPlacement) -> bool:
    return all(block.kept == set(ACTIVATIONS) for block in placement.blocks)


@pytest.mark.parametrize(
    ("family", "dtype", "recordable"),
    [("llama", torch.bfloat16, True), ("llama", torch.float32, False), ("gemma2", torch.bfloat16, False)],
)
def test_passes_that_go_by_lengths_on_the_host_are_not_recorded(
    family: str, dtype: torch.dtype, recordable: bool
) -> None:
    assert FusedEngine(model_of(family).to(dtype)).is_recordable == recordable


def test_a_pass_with_dropout_is_not_the_recorded_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recording:
        def replay(self) -> None: ...

    output = StepOutput(torch.tensor(-1.0), torch.tensor(1.0), {})

    def record(self: Graphs, inputs: Inputs, objective: Objective) -> Any:
        return SimpleNamespace(graph=Recording(), inputs=inputs.cloned(), output=output)

    monkeypatch.setattr(Graphs, "_record", record)
    engine = FusedEngine(model_of("llama", lora_dropout=0.3))
    engine._graphs = Graphs(engine._pass)
    with engine.dropout_off():
        losses = [engine.forward_backward(batch_of(), LIKELIHOOD).loss.item() for _ in range(3)]
    assert losses[1:] == [-1, -1], "recorded"
    assert engine.forward_backward(batch_of(), LIKELIHOOD).loss.item() > 0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adamw_32bit"])
def test_one_launch_for_all_adapters_is_one_for_each(optim: str) -> None:
    """Sizes here are multiples of 256, and large enough that bitsandbytes keeps 8-bit states of them."""
    results = []
    for flat in (True, False):
        model = model_of(
            "llama", changes={"intermediate_size": 256, "hidden_size": 256, "num_key_value_heads": 4}, r=16
        )
        engine = FusedEngine(model)
        parameters = [engine.master] if flat else [p for p in model.parameters() if p.requires_grad]
        optimizer = build_optimizer(parameters, Train(optim=optim, learning_rate=1e-2, weight_decay=0.1), "cpu")
        for seed in range(3):
            engine.forward_backward(batch_of(seed=seed).scaled(0.01), LIKELIHOOD)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        results.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert worst(*results)[0] < 1e-6, worst(*results)


def test_a_model_that_is_not_covered_is_named() -> None:
    with pytest.raises(NotCoveredError, match="opt"):
        FusedEngine(model_of("opt"))


def test_adapters_of_several_dropouts_on_one_input_are_not_covered() -> None:
    model = model_of("llama", lora_dropout=0.3)
    model.get_base_model().model.layers[0].self_attn.v_proj.lora_dropout["default"].p = 0.1
    with pytest.raises(NotCoveredError, match=r"layers\.0\.self_attn\.q_proj, .*: adapters of several dropouts"):
        FusedEngine(model)


@pytest.mark.parametrize("skipped", ["q_proj", "k_proj"])
def test_linears_of_one_input_of_which_one_is_not_in_4_bits_are_not_covered(
    skipped: str, tiny_model: Callable[..., Path]
) -> None:
    """As in checkpoints that leave the layers which suffer most in 16 bits."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", skipped])
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(), quantization_config=config)
    with pytest.raises(NotCoveredError, match=r"layers\.0\.self_attn\.q_proj, .*: some in 4 bits and some not"):
        FusedEngine(attach(base, Adapter(), 0))
