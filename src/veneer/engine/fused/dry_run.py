"""Runs the fused engine dry on meta tensors: its memory and work are known before anything is loaded.

The engine itself runs, on a model whose frozen weights and adapters are stand-ins with a shape and no data: the parts
of PEFT's and bitsandbytes' modules that `decoder` reads, and no more, since importing either takes longer than a plan
may. Kernels launched on meta tensors only report the bytes they would move; allocations between them are traced. So a
tensor that the engine no longer allocates leaves the forecast with it.

Not counted: FlexAttention's own memory (flash's is), the launches of recorded passes, and the plain torch twins, which
take more memory than the kernels; they are for tests. Pairs are run dry as rows with as many tokens and as much
attention; the keys that are gathered for them are not counted.

Shapes: T tokens, N trained ones, D inputs and M outputs of a linear layer, R rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from veneer.data.batch import UNTRAINED, Batch
from veneer.engine.dry_run import CONSTANT_BLOCK, QUANT_BLOCK, DryRun, Step, backward_phase
from veneer.engine.fused.attention import PLANNED
from veneer.engine.fused.block import ACTIVATIONS, Block
from veneer.engine.fused.decoder import NotCoveredError
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.graphs import Inputs, rounded
from veneer.engine.fused.policy import Demand, block_placement, checkpointed, choose_placement
from veneer.engine.placement import MemoryPlacement, Rates
from veneer.engine.trace import Trace
from veneer.engine.trace import rounded as rounded_bytes
from veneer.kernels.launch import LISTENERS

META = torch.device("meta")


def run_layers_dry(base: Any, step: Step, period: int) -> DryRun:
    """Run a micro-batch, or its held-out loss, dry through all layers of a model.

    Args:
        base: model on the meta device; changed.
        step: the micro-batch.
        period: layers that have phases of their own in backward, at its beginning and at its end.

    Raises:
        NotCoveredError: the engine does not compute this model.
    """
    engine, held = _engine(base, step)
    inputs = _inputs(step, engine)
    trace = Trace(stands_in=False)
    engine.watch(trace, period)
    with trace, _counting_launches(trace), _planned_capability(step), torch.no_grad():
        trace.mark("forward", "activations")
        engine.run_dry(inputs, step.training)
    records = step.training and engine.is_recordable
    return DryRun(dict(trace.peaks), trace.total_work(), held, records)


def require_covered(base: Any, step: Step) -> None:
    """Raise NotCoveredError if the engine does not compute a model on the meta device, which is changed."""
    _engine(base, step)


class StepPeaks(NamedTuple):
    """The predicted peaks of a step that keeps nothing: of the whole step, and while the loss is computed; bytes."""

    whole: int
    loss: int


def dry_engine(base: Any, step: Step) -> "DryEngine":
    """Build the engine for `predict_placement`.

    Args:
        base: model on the meta device, with a few layers that repeat in the model; changed.
        step: the largest micro-batch.
    """
    return _engine(base, step)[0]


def predict_placement(
    engine: "DryEngine",
    step: Step,
    depth: int,
    gradient_checkpointing: bool | str,
    peaks: StepPeaks,
    budget_bytes: int,
    rates: Rates,
) -> MemoryPlacement:
    """Return the placement that the engine would choose, by its own policy.

    Args:
        engine: `dry_engine` of the model and the step; not changed.
        step: the largest micro-batch.
        depth: layers of the model.
        gradient_checkpointing: the setting; only auto depends on memory.
        peaks: predicted peaks of a step that keeps nothing.
        budget_bytes: memory of the device.
        rates: speeds of the device and its link, and the host's memory.
    """
    blocks = [engine.blocks[number % len(engine.blocks)] for number in range(depth)]
    for block in engine.blocks:
        block.shards = step.shards
    records = engine.is_recordable and step.shards == 1
    if gradient_checkpointing != "auto":
        return replace(checkpointed(blocks, gradient_checkpointing), records_passes=step.even and records)
    with _planned_capability(step):
        backend = blocks[0].attention.backend(_inputs(step, engine).documents, engine.decoder.norm.weight_D)
        rows = step.rows if backend == "cudnn" else 0
        demand = Demand(
            rounded(step.rows * step.length),
            step.length,
            rows,
            peaks.whole,
            ends_bytes=engine.ends.bytes,
            loss_bytes=peaks.loss,
        )
        return choose_placement(blocks, demand, budget_bytes, records, rates)


class DryEngine(FusedEngine):
    """The engine of a dry run, with a phase of the trace for its head and for the backward of each block."""

    def watch(self, trace: Trace, period: int) -> None:
        """Begin phases in this trace."""
        self._trace, self._period = trace, period

    def run_dry(self, inputs: Inputs, training: bool) -> None:
        """Run a pass, or the forward with losses alone."""
        self._pass(inputs) if training else self._logprobs(inputs)

    def _head(self, *arguments: Any) -> Any:
        self._trace.mark("loss", "logits and loss")
        found = super()._head(*arguments)
        phases = [backward_phase(block.number, len(self.blocks), self._period) for block in self.blocks]
        self.blocks = [_Marked(block, self._trace, phase) for block, phase in zip(self.blocks, phases, strict=True)]
        return found

    def _angles(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Transformers' modules read the values of positions to choose angles; only the shape matters here.
        table = torch.empty((rows, len(self.decoder.rotary.inv_freq)), device=META)
        return table, table.clone()


class _Marked(Block):
    """A block whose backward begins a phase."""

    def __init__(self, block: Block, trace: Trace, phase: str) -> None:
        vars(self).update(vars(block))
        self._trace, self._phase = trace, phase

    def backward(self, *arguments: Any) -> None:
        self._trace.mark(self._phase, "working set")
        super().backward(*arguments)


def _engine(base: Any, step: Step) -> tuple[DryEngine, dict[str, int]]:
    """Build the engine on stand-ins; also return the bytes that it always holds, by component."""
    if not step.adapter.is_low_rank:
        raise NotCoveredError(f"adapters of the method {step.adapter.name}")
    model = _Adapted(base, step)
    weights = [module.weight for module in model.replaced if not isinstance(module.weight, _Packed)]
    laid_out = sum(rounded_bytes(weight.numel() * weight.element_size()) for weight in weights)
    depth = base.config.num_hidden_layers
    chosen = (step.block or block_placement(ACTIVATIONS)).on_device()
    last = block_placement(ACTIVATIONS) if step.keeps_last else chosen
    with Trace(stands_in=False) as trace:
        trace.mark("start", "adapter's 16-bit copies")
        engine = DryEngine(model, graphs=False)
        engine.apply(replace(engine.placement, blocks=(*[chosen] * (depth - 1), last)))
        trace.assign(engine.master.data, "adapter")
        trace.assign(engine._flat_grad, "gradients")
        trace.assign(engine._scratch, "dequantized weights")
        for block in engine.blocks:
            for group in block.groups:
                if group._resident is not None:
                    trace.assign(group._resident, "other weights" if not group.is_quantized else "dequantized weights")
        engine._rotary(_inputs(step, engine).documents.longest)
        held = dict(trace.live)
    # Weights in 16 bits are moved into padded matrices: only the padding is added.
    held["other weights"] = held.get("other weights", 0) - laid_out
    return engine, {name: count for name, count in held.items() if count}


def _inputs(step: Step, engine: DryEngine) -> Inputs:
    """Return a dummy micro-batch, padded as the engine pads it."""
    tokens = step.rows * step.length
    targets = torch.full((tokens,), UNTRAINED)
    targets[: step.trained] = 0
    lengths = [step.length] * step.rows
    if not step.even:
        lengths = [*lengths[:-1], step.length - 1, 1]
    ids = torch.zeros(tokens, dtype=torch.int64)
    batch = Batch(ids, targets, torch.ones(tokens), tuple(lengths), step.trained, float(step.trained))
    return Inputs.of(batch, META, engine.decoder.longest, step.training and engine.is_recordable)


@contextmanager
def _counting_launches(trace: Trace) -> Iterator[None]:
    """Within the context, a trace counts launches of kernels."""
    LISTENERS.append(trace.note_moved)
    try:
        yield
    finally:
        LISTENERS.remove(trace.note_moved)


@contextmanager
def _planned_capability(step: Step) -> Iterator[None]:
    """Within the context, attention takes the backend of the GPU that is planned for."""
    before = PLANNED.set(step.capability)
    try:
        yield
    finally:
        PLANNED.reset(before)


class _Adapted(torch.nn.Module):
    """A stand-in for a PEFT model of a base on the meta device, with 4-bit weights where the step has them.

    Attributes:
        replaced: frozen linear layers of the decoder blocks.
    """

    def __init__(self, base: Any, step: Step) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.replaced: list[Any] = []
        head = base.get_output_embeddings()
        uncovered = step.targets | step.parts.paths
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in step.parts.biases)
        for path, module in list(base.named_modules()):
            if not isinstance(module, torch.nn.Linear) or module is head or path in step.parts.paths:
                if path in uncovered and hasattr(module, "weight"):
                    module.weight.requires_grad_(True)  # stands for what the engine does not cover
                continue
            layer = _quantized(module, step) if path in step.quantized else module
            self.replaced.append(layer)
            if path in step.targets:
                sides = module.in_features, module.out_features
                layer = step.adapter.stand_in(layer, *sides, step.rank_of(path), step.dropout)
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, layer)

    def get_base_model(self) -> Any:
        return self.base


class _Packed(torch.nn.Parameter):
    """A stand-in for bitsandbytes' Params4bit."""

    quant_state: Any


def _quantized(linear: torch.nn.Linear, step: Step) -> Any:
    """Return a stand-in for bitsandbytes' Linear4bit."""
    module: Any = torch.nn.Module()
    weights = linear.weight.numel()
    blocks = weights // QUANT_BLOCK
    double = step.double_quant
    with META:
        packed = _Packed(torch.empty(weights // 2, 1, dtype=torch.uint8), requires_grad=False)
        nested = SimpleNamespace(code=torch.empty(256), absmax=torch.empty(-(-blocks // CONSTANT_BLOCK)))
        packed.quant_state = SimpleNamespace(
            absmax=torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
            code=torch.empty(16),
            state2=nested if double else None,
            offset=torch.empty(()) if double else None,
            shape=linear.weight.shape,
            blocksize=QUANT_BLOCK,
        )
    module.weight, module.bias = packed, linear.bias
    module.in_features, module.out_features = linear.in_features, linear.out_features
    return module
