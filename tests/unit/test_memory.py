"""What a step holds, from shapes alone: against PEFT's and bitsandbytes' own tensors, and against every layer run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft import LoraConfig, get_peft_model

import veneer.engine.dry_run as dry_run_module
from tests.support.dry_runs import config_of, step
from veneer.config import Run, Train
from veneer.data.batch import Batches, Example
from veneer.engine.dry_run import Step, run_dry
from veneer.engine.reference import padded_groups
from veneer.engine.trace import _QUICK, Trace, on_meta, rounded
from veneer.kernels import linear_cross_entropy
from veneer.model.shapes import Shapes, build, shapes_of
from veneer.planning.batch_shapes import Lengths, rows_of
from veneer.planning.held_out import generation_peak, held_out_peak
from veneer.planning.memory import loaded, optimizer_bytes, persistent, phases, quantized_bytes
from veneer.training.optimizer import build_optimizer

MiB = 2**20


def maker(family: str, depth: int) -> tuple[Callable[[int], Any], Shapes]:
    config = config_of(family, depth)
    return lambda layers: build(config, torch.bfloat16, layers), shapes_of(build(config, torch.bfloat16))


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.127), (False, 4.5)])
def test_4_bit_weights_take_what_bitsandbytes_keeps(double_quant: bool, bits: float) -> None:
    weights = torch.randn(1024, 1024)
    packed, state = quantize_4bit(weights, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    kept = [packed, state.absmax, state.code]
    if double_quant:
        kept += [state.state2.absmax, state.state2.code, state.offset]
    assert quantized_bytes(2**20, double_quant) == sum(rounded(t.numel() * t.element_size()) for t in kept)
    large = 2**26
    assert 8 * quantized_bytes(large, double_quant) / large == pytest.approx(bits, abs=0.001)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "adamw_32bit"])
def test_optimizer_states_take_what_the_optimizer_keeps(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (100, 4096, 70_000)]
    if name == "adamw_32bit":
        pytest.importorskip("bitsandbytes")
    optimizer = build_optimizer(parameters, Train(optim=name, output_dir="-"), "cpu")
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = {
        tensor.data_ptr(): tensor
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    expected = sum(rounded(t.numel() * t.element_size()) for t in kept.values())
    assert optimizer_bytes([p.numel() for p in parameters], name) == expected


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "opt", "llama with embeddings"])
def test_the_stand_in_for_peft_holds_what_peft_holds(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _, more = family.partition(" with ")
    targets: Any = ["q_proj", "embed_tokens"] if more else "all-linear"
    make, shapes = maker(family, 2)
    found = shapes.targets(tuple(targets) if more else targets)
    asked = step(shapes, checkpointing=checkpointing, targets=found)
    ours, work = dry_run_module._run(make(2), asked, 2, True)

    def adapt(base: Any, step: Step) -> None:
        base.requires_grad_(False)
        conv1d = family == "gpt2"
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, fan_in_fan_out=conv1d)
        with torch.device("meta"):
            get_peft_model(base, config)

    monkeypatch.setattr(dry_run_module, "adapt", adapt)
    real, real_work = dry_run_module._run(make(2), asked, 2, True)
    assert ours == real
    assert work == real_work


@pytest.mark.parametrize("changes", [{}, {"checkpointing": False}, {"training": False}, {"accumulating": True}])
@pytest.mark.parametrize(("family", "period"), [("llama", 1), ("gemma2", 2)])
def test_a_deep_model_is_carried_on_as_if_every_layer_were_run(
    family: str, period: int, changes: dict[str, Any]
) -> None:
    depth = 9 if period == 1 else 10
    make, shapes = maker(family, depth)
    assert shapes.period == period
    asked = step(shapes, quantized=shapes.quantizable(), method="qlora", **changes)
    short = run_dry(make, depth, shapes.period, asked)
    whole = run_dry(make, depth, None, asked)
    for phase in ("forward", "backward") if asked.training else ("forward",):
        assert short.fullest(phase).bytes == whole.fullest(phase).bytes
    for kind, count in whole.work.items():
        assert short.work[kind] == pytest.approx(count)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [12, 7])  # of 60: without a rest, and with one
def test_a_chunk_of_the_loss_counts_for_all_that_are_alike(
    tokens: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shapes = maker("llama", 2)
    asked = step(shapes, training=training)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", tokens * 4 * shapes.vocabulary)
    few = run_dry(make, 2, None, asked)
    monkeypatch.setattr(linear_cross_entropy, "chunk_starts", lambda count, chunk, is_meta: range(0, count, chunk))
    assert few == run_dry(make, 2, None, asked)


def made(result: Any) -> list[Any]:
    """Shape, strides, dtype and bytes of tensors."""
    tensors = result if isinstance(result, tuple) else (result,)
    return [t is None or (t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_norm_makes_the_tensors_that_torch_makes(dtype: torch.dtype) -> None:
    x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 3, 8), (8,)))
    forward = torch.ops.aten.native_layer_norm.default, (x, [8], weight, weight, 1e-5)
    means, deviations = forward[0](*forward[1])[1:]
    given = (x, x, [8], means, deviations, weight, weight, [True, False, False])
    for function, operands in (forward, (torch.ops.aten.native_layer_norm_backward.default, given)):
        assert made(on_meta(function, operands, {})) == made(function(*operands))


def of_shape(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "x",
    [
        *(of_shape((4, 6, 8)), of_shape((4, 6, 8), torch.bfloat16), of_shape((6, 8)), of_shape((8,))),
        *(of_shape((4, 8, 6)).mT, of_shape((4, 6, 16))[..., :8], of_shape((8,)).expand(4, 6, 8)),
    ],
    ids=["float32", "bfloat16", "matrix", "vector", "transposed", "apart", "expanded"],
)
def test_quick_operations_make_the_tensors_that_torch_makes(x: torch.Tensor) -> None:
    aten, whole, row = torch.ops.aten, x.to(torch.int64), of_shape((8,), x.dtype)
    others: list[tuple[Any, tuple[Any, ...]]] = [
        *((function, (x,)) for function in (aten.neg.default, aten.rsqrt.default, aten.silu.default)),
        *((function, (x,)) for function in (aten.empty_like.default, aten.zeros_like.default, aten.clone.default)),
        *((function, (x, 2)) for function in (aten.mul.Scalar, aten.div.Scalar, aten.ge.Scalar, aten.lt.Scalar)),
        *((aten.pow.Tensor_Scalar, (x, power)) for power in (2, 0.5)),
        *((function, (x, y)) for y in (x, row, 0.5) for function in (aten.add.Tensor, aten.sub.Tensor)),
        *((function, (x, y)) for y in (x, row) for function in (aten.mul.Tensor, aten.div.Tensor)),
        *((function, (x, [-1], keep)) for keep in (True, False) for function in (aten.mean.dim, aten.sum.dim_IntList)),
        *((aten.cat.default, ([x, x], dim)) for dim in (0, -1)),
        *((aten.masked_fill.Scalar, (x, y.bool(), 0.0)) for y in (x, row)),
        *((aten.bitwise_and.Tensor, (y, y)) for y in (whole, whole.bool())),
        *((aten.add_.Tensor, (x.clone(), y)) for y in (x, row)),
        *((aten.mm.default, (y.flatten()[:8].expand(3, 8), y.flatten()[:8, None])) for y in (x, row)),
        (aten.addmm.default, (row, row.expand(3, 8), row.expand(8, 8))),
        (aten.new_empty.default, (x, [3, 4])),
        (aten._log_softmax.default, (x, -1, False)),
        (aten._softmax_backward_data.default, (x, x, -1, x.dtype)),
    ]
    for function, operands in others:
        assert made(on_meta(function, operands, {})) == made(function(*operands)), function
    named: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        *((aten._to_copy.default, (x,), {"dtype": dtype}) for dtype in (torch.float16, torch.int64)),
        (aten._to_copy.default, (x,), {"dtype": torch.float16, "memory_format": torch.contiguous_format}),
        (aten.sum.dim_IntList, (x, [0]), {"dtype": torch.float32}),
        (aten.empty_like.default, (x,), {"dtype": torch.float16, "pin_memory": False}),
        (aten.zeros.default, ([2, 3],), {"device": torch.device("meta"), "pin_memory": False}),
        (aten.zeros.default, ([2, 3],), {"device": torch.device("meta"), "dtype": torch.int64}),
    ]
    for function, operands, names in named:
        assert made(on_meta(function, operands, names)) == made(function(*operands, **names)), function
    elsewhere = {aten.native_layer_norm.default, aten.native_layer_norm_backward.default, aten._grouped_mm.default}
    in_place = {aten.exp_.default, aten.mm.out, aten.addmm.out}
    assert _QUICK.keys() - elsewhere - in_place == {function for function, *_ in [*others, *named]}, "all are compared"


def test_a_question_about_a_real_number_is_answered_truly() -> None:
    with Trace() as trace:
        trace.mark("forward", "activations")
        assert not torch.rand([]) < 0.0, "OPT drops layers by such a question"
        assert (torch.empty(3, device="meta") < 0.0).all()


def test_recomputation_saves_memory_and_costs_work() -> None:
    make, shapes = maker("llama", 4)
    keep = run_dry(make, 4, 1, step(shapes, checkpointing=False))
    again = run_dry(make, 4, 1, step(shapes))
    assert again.fullest("backward").bytes < keep.fullest("backward").bytes
    assert sum(again.work.values()) > 1.2 * sum(keep.work.values())


def test_phases_name_every_component() -> None:
    make, shapes = maker("llama", 4)
    held = step(shapes, training=False, rows=1)
    asked = step(shapes, accumulating=True, quantized=shapes.quantizable(), method="qlora")
    train, tested = run_dry(make, 4, 1, asked), run_dry(make, 4, 1, held)
    found = phases(shapes, asked, "adamw_8bit", train, "cuda")
    found["evaluation"] = held_out_peak(persistent(shapes, asked, "adamw_8bit", train, "cuda")[0], train, tested)
    found["generation"] = generation_peak(loaded(shapes, asked, "cuda"), shapes, held, tested, 256, "cuda")
    assert set(found) == {"load", "forward", "backward", "optimizer", "evaluation", "generation"}
    for peak in found.values():
        assert peak.bytes == sum(peak.components.values())
    parts = {"4-bit weights", "embeddings and head", "other weights", "adapter", "optimizer", "gradients", "libraries"}
    assert parts <= set(found["backward"].components)
    assert "weights on their way" in found["load"].components
    assert "generation cache" in found["generation"].components
    assert "optimizer" not in found["generation"].components, "answers are generated from a saved adapter"
    paged = phases(shapes, asked, "paged_adamw_8bit", train, "cuda")
    assert not paged["backward"].components.get("optimizer"), "paged states are on the host"


def test_full_fine_tuning_trains_all_and_keeps_a_copy_in_float32() -> None:
    make, shapes = maker("llama", 4)
    full = step(shapes, method="full", targets=frozenset())
    found = phases(shapes, full, "adamw_torch", run_dry(make, 4, 1, full), "cuda")
    sixteen = 16 * shapes.total  # weights and gradients in 16 bits, a copy and two moments in 32
    assert found["optimizer"].bytes - found["optimizer"].components["libraries"] == pytest.approx(sixteen, rel=0.1)


@pytest.mark.parametrize(("size", "packing"), [(1, False), (4, False), (3, True)])
def test_the_fullest_micro_batch_predicted_is_the_fullest_there_is(size: int, packing: bool) -> None:
    lengths = np.random.default_rng(0).integers(5, 200, size=150)
    run = Run.model_validate(
        {
            "model": {"base": "-"},
            "data": {"train": "-", "max_length": 256, "packing": packing},
            "train": {"output_dir": "-", "per_device_train_batch_size": size, "gradient_accumulation_steps": 3},
        }
    )
    prediction = rows_of(run, "reference", Lengths(lengths, lengths - 3), Lengths(lengths[:7], lengths[:7] - 3))

    examples = [Example(np.zeros(n, dtype=np.int32), ((3, int(n), 1.0),), "rows:1") for n in lengths]
    met = []
    batches = Batches(examples, lengths, size, 3, 0, 256 if packing else None)
    for number in range(prediction.steps or 0):
        for batch in batches.step(number):
            for group in padded_groups(batch.lengths):
                met.append(len(group) * batch.lengths[group[0]])
    assert prediction.fullest.rows * prediction.fullest.length >= max(met)
    assert prediction.fullest.rows * prediction.fullest.length <= 1.25 * max(met)
    assert prediction.steps == batches.steps_per_epoch * run.train.num_train_epochs
    tested = [int(n) for n in lengths[:7]]
    fullest = max(padded_groups(tested), key=lambda group: len(group) * tested[group[0]])
    assert prediction.held_out is not None
    assert prediction.held_out[:2] == (len(fullest), tested[fullest[0]])


def test_rows_longer_than_the_limit_count_as_the_run_treats_them() -> None:
    lengths = np.array([100, 300, 500])
    settings: dict[str, Any] = {"model": {"base": "-"}, "train": {"output_dir": "-"}}
    for overlong, longest in (("truncate", 256), ("drop", 100)):
        run = Run.model_validate(settings | {"data": {"train": "-", "max_length": 256, "overlong": overlong}})
        assert (
            rows_of(run, "reference", Lengths(lengths, lengths), Lengths(lengths[:0], lengths[:0])).fullest.length
            == longest
        )


@pytest.mark.parametrize("packing", [False, True])
def test_the_fused_engine_takes_a_micro_batch_whole_and_pads_nothing(packing: bool) -> None:
    lengths = np.random.default_rng(0).integers(5, 200, size=150)
    run = Run.model_validate(
        {
            "model": {"base": "-"},
            "data": {"train": "-", "max_length": 256, "packing": packing},
            "train": {"output_dir": "-", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        }
    )
    rows = Lengths(lengths, lengths - 3), Lengths(lengths[:7], lengths[:7] - 3)
    fused, reference = rows_of(run, "fused", *rows), rows_of(run, "reference", *rows)
    examples = [Example(np.zeros(n, dtype=np.int32), ((3, int(n), 1.0),), "rows:1") for n in lengths]
    batches = Batches(examples, lengths, 4, 3, 0, 256 if packing else None)
    met = [len(batch.ids_T) for number in range(batches.steps_per_epoch) for batch in batches.step(number)]
    assert max(met) <= fused.fullest.rows * fused.fullest.length <= 1.1 * max(met)
    assert fused.held_out is not None
    assert 0 <= fused.held_out.rows * fused.held_out.length - lengths[:7].sum() < 7
    assert fused.passes <= reference.passes
    assert not fused.even
    assert fused.replayed > 0.9, "padded to a few sizes"
    wide = np.random.default_rng(0).integers(500, 20000, size=600)
    some = np.random.default_rng(1).integers(1, wide)
    longer = run.model_copy(update={"data": run.data.model_copy(update={"max_length": 20000, "packing": False})})
    assert rows_of(longer, "fused", Lengths(wide, some), rows[1]).replayed < 0.5
    same = np.full(40, 100)
    even = rows_of(run, "fused", Lengths(same, same - 3), Lengths(same[:4], same[:4] - 3))
    assert even.even
    assert even.replayed == 1
    alone = run.model_copy(update={"train": run.train.model_copy(update={"per_device_train_batch_size": 1})})
    assert not rows_of(alone, "fused", *rows).even, "each by itself, but of other lengths"
