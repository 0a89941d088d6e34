"""Runs the reference engine dry on meta tensors: the memory and the work of a step, before anything is loaded.

Transformers' own model code runs, and the engine's own loss; only the operations that PEFT and bitsandbytes add to a
linear layer have stand-ins (a test compares them with the real ones). They are not imported, since a plan should answer
at once, and bitsandbytes' kernels need data anyway.

Decoder layers are alike, so a deep model is run dry with a few of them and extrapolated linearly: each phase of a step
(the forward, the head and the loss, the backward of the last layers, of the first) adds the same bytes for each further
layer. Where layers differ in a pattern, the pattern is repeated whole; where there is none, all layers are run dry.

Shapes: B rows, L length, N trained tokens, K inputs and M outputs of a linear layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.engine.placement import BlockPlacement
from veneer.engine.reference import PaddedRows, token_logprobs
from veneer.engine.trace import FlashAttention, Peak, Trace, Work, is_view, on_meta
from veneer.kernels.linear_cross_entropy import LISTENERS
from veneer.model.adapters.lora import LORA
from veneer.model.adapters.method import AdapterMethod
from veneer.model.quiet import quiet
from veneer.model.shapes import Shapes, decoder_layers
from veneer.model.target_modules import rank_of
from veneer.model.trained_parts import NO_PARTS, TrainedParts

QUANT_BLOCK = 64  # weights that share a constant in bitsandbytes' 4-bit formats
CONSTANT_BLOCK = 256  # constants that share one of their own under double quantization


@dataclass(frozen=True)
class Step:
    """A micro-batch for a dry run.

    Attributes:
        rows, length: padded shape: rows, and tokens of each.
        trained: trained tokens in it.
        dtype: compute dtype.
        method: qlora, lora or full.
        targets: paths of the modules the adapter is on.
        quantized: paths of the modules whose weights are in 4 bits.
        adapter, r, dropout: method of the adapter, its rank and its dropout.
        rank_pattern: ranks of modules that differ, by pattern; the first that matches counts.
        double_quant: whether the constants of 4-bit blocks are quantized too.
        checkpointing: whether the reference engine recomputes activations.
        engine: reference or fused.
        block: placement of each of the fused engine's blocks; None: everything is kept.
        keeps_last: whether the last block keeps everything nevertheless.
        even: whether the rows are of one length; the fused engine has other kernels for uneven ones.
        capability: major compute capability of the GPU, where the engine has kernels of its own for it.
        accumulating: whether gradients of an earlier micro-batch are held.
        training: whether there is a backward; else only the held-out loss is computed.
        releases: whether gradients are dropped as soon as they are whole.
        copies: whether 4-bit weights have 16-bit copies beside them, as on a CPU with memory for them.
        parts: biases, modules and rows that are trained beside the adapter's matrices.
        shards: number of GPUs that the fused engine's frozen 4-bit weights are spread over.
    """

    rows: int
    length: int
    trained: int
    dtype: Any
    method: str = "lora"
    targets: frozenset[str] = frozenset()
    quantized: frozenset[str] = frozenset()
    adapter: AdapterMethod = LORA
    r: int = 16
    dropout: float = 0.0
    double_quant: bool = True
    checkpointing: bool = True
    engine: str = "reference"
    block: BlockPlacement | None = None
    keeps_last: bool = False
    even: bool = True
    capability: int = 9
    accumulating: bool = False
    training: bool = True
    copies: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    parts: TrainedParts = NO_PARTS
    releases: bool = False
    shards: int = 1

    def rank_of(self, path: str) -> int:
        """Return the rank of a module's adapter."""
        return rank_of(path, self.r, self.rank_pattern)

    def adapter_sizes(self, shapes: Shapes) -> list[int]:
        """Return the sizes of the adapter's parameters, and of those that are trained beside them."""
        return self.adapter.sizes(shapes, self.targets, self.r, self.rank_pattern) + self.parts.sizes(shapes)

    def sizes_in_16_bits(self, shapes: Shapes) -> list[int]:
        """Return the sizes of those among `adapter_sizes` that are in 16 bits, and are updated in a float32 copy."""
        return self.parts.sizes_in_base_dtype(shapes) if self.dtype.itemsize < 4 else []


@dataclass(frozen=True)
class DryRun:
    """The memory of a micro-batch beside weights, adapter and optimizer, and its work.

    Attributes:
        peaks: peak of each of its phases: `forward`, `loss`, `backward ...`.
        work: operations of forward and backward.
        held: bytes of buffers that the engine always holds, instead of adapter and gradients and beside the weights;
            None: it has none.
        records: whether passes of a shape that recurs are recorded and replayed without the host.
    """

    peaks: dict[str, Peak]
    work: Work
    held: dict[str, int] | None = None
    records: bool = False

    def fullest(self, phase: str) -> Peak:
        """Return the peak of a phase: `forward` (with the loss) or `backward`."""
        found = [m for name, m in self.peaks.items() if ("backward" in name) == (phase == "backward")]
        return max(found, key=lambda peak: peak.bytes)

    @property
    def recorded_bytes(self) -> int:
        """The bytes that a recording holds between its passes: the peak of one of them."""
        return max(peak.bytes for peak in self.peaks.values()) if self.records else 0


FUSED_TOKENS = 1536  # up to so many tokens, bitsandbytes does not dequantize the whole weight


def run_dry(
    make: Callable[[int], Any], depth: int, period: int | None, step: Step, chunks_head: bool | None = None
) -> DryRun:
    """Run a micro-batch dry, or the held-out loss of one.

    Args:
        make: function that builds the base model on the meta device with so many layers.
        depth: layers of the model.
        period: layers after which they repeat; None: they do not.
        step: the micro-batch.
        chunks_head: whether `head_is_linear` is true of the model; None: it is asked.
    """
    if chunks_head is None:
        chunks_head = head_is_linear(make(period or depth))

    def run(layers: int, ends: int) -> DryRun:
        return DryRun(*_run(make(layers), step, ends, chunks_head))

    return extrapolate(run, depth, period, step.training)


def extrapolate(run: Callable[[int, int], DryRun], depth: int, period: int | None, training: bool) -> DryRun:
    """Extrapolate the dry run of a deep model linearly from those of two models with few layers.

    Args:
        run: function from a number of layers, and of those at either end with own backward phases, to a dry run.
        depth, period: arguments of `run_dry`.
        training: whether there is a backward.
    """
    few = depth if period is None else (3 if training else 2) * period + depth % period
    if period is None or few + period >= depth:
        return run(depth, depth)
    a, b = run(few, period), run(few + period, period)
    times = (depth - few - period) / period

    def on(before: float, after: float) -> float:
        return after + (after - before) * times

    def bytes_on(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
        return {name: round(on(before.get(name, 0), count)) for name, count in after.items()}

    def peak_on(before: Peak, after: Peak) -> Peak:
        return Peak(round(on(before.bytes, after.bytes)), bytes_on(before.components, after.components))

    return DryRun(
        {name: peak_on(peak, b.peaks[name]) for name, peak in a.peaks.items()},
        {name: on(a.work.get(name, 0), count) for name, count in b.work.items()},
        None if a.held is None or b.held is None else bytes_on(a.held, b.held),
        b.records,
    )


def _run(base: Any, step: Step, period: int, chunked_head: bool) -> tuple[dict[str, Peak], Work]:
    """Run one micro-batch; return the peaks of its phases, and its work.

    Layers between the first two periods and the last one hold no more than these, and have no phase of their own.
    """
    adapt(base, step)
    chunked_head = chunked_head and type(base.get_output_embeddings()) is torch.nn.Linear
    trace = Trace()
    rows = _rows(step)
    base.base_model.register_forward_hook(lambda *_: trace.mark("loss", "logits and loss"))
    if not step.training:
        base.eval()
        with trace, _counting_chunks(trace), torch.no_grad():
            trace.mark("forward", "activations")
            token_logprobs(base, rows, chunked_head)
        return dict(trace.peaks), trace.total_work()
    if step.checkpointing:
        contexts = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), FlashAttention())}
        with quiet():
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=contexts)
    base.train()
    _follow_backward(decoder_layers(base), trace, period)

    def on_gradient(parameter: torch.Tensor) -> None:
        if step.releases:
            parameter.grad = None
        else:
            trace.assign(parameter.grad, "gradients")  # type: ignore[arg-type]

    for parameter in base.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(on_gradient)
            if step.accumulating:
                parameter.grad = torch.zeros_like(parameter)  # made before the trace: the planner counts it
    with trace, _counting_chunks(trace):
        trace.mark("forward", "activations")
        logprobs_N = token_logprobs(base, rows, chunked_head)
        trace.mark("loss", "logits and loss")
        logprobs_N.backward(-rows.weights_N)  # type: ignore[no-untyped-call]
    return dict(trace.peaks), trace.total_work()


@contextmanager
def _counting_chunks(trace: Trace) -> Iterator[None]:
    """Within the context, a trace counts a chunk of the loss as often as it stands for others."""

    def listen(times: int) -> None:
        trace.times = times

    LISTENERS.append(listen)
    try:
        yield
    finally:
        LISTENERS.remove(listen)


def _follow_backward(layers: list[Any], trace: Trace, period: int) -> None:
    """Begin a phase with the backward of each layer: when the gradient of its output has been computed."""
    for number, layer in enumerate(layers):

        def on_output(_: Any, __: Any, output: Any, phase: str = backward_phase(number, len(layers), period)) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: trace.mark(phase, "working set"))

        layer.register_forward_hook(on_output)


def backward_phase(number: int, depth: int, period: int) -> str:
    """Return the phase of a layer's backward: only layers at either end have one of their own."""
    if number >= depth - period:
        return f"backward -{depth - number}"
    return f"backward {number}" if number < 2 * period else "backward between"


def _rows(step: Step) -> PaddedRows:
    """Return a dummy micro-batch."""
    with torch.device("meta"):
        ids_BL = torch.empty((step.rows, step.length), dtype=torch.int64)
        index_N = torch.empty((step.trained,), dtype=torch.int64)
        return PaddedRows(0, ids_BL, index_N, index_N, index_N, torch.empty((step.trained,)), index_N)


def head_is_linear(base: Any) -> bool:
    """Return whether a model computes logits from its last hidden state by one product alone."""
    head = base.get_output_embeddings()
    if type(head) is not torch.nn.Linear or base.base_model is base:
        return False

    class Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
        between: list[str] | None = None

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if self.between is not None and not is_view(function):
                self.between.append(str(function))
            return on_meta(function, args, kwargs or {})

    names = Names()  # type: ignore[no-untyped-call]
    hook = base.base_model.register_forward_hook(lambda *_: setattr(names, "between", []))
    with names, torch.no_grad():
        base(input_ids=torch.empty((1, 8), dtype=torch.int64, device="meta"), use_cache=False)
    hook.remove()
    return names.between is not None and [name.split(".")[1] for name in names.between] in (["mm"], ["addmm"])


def adapt(base: Any, step: Step) -> None:
    """Put adapters on a model on the meta device and quantize it, in place, as `attach` and `load_model` would."""
    base.requires_grad_(step.method == "full")
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in step.parts.biases)
    for path, module in list(base.named_modules()):
        if path in step.targets or path in step.quantized:
            # The weight of GPT-2's Conv1D is transposed, and an embedding's too.
            is_turned = hasattr(module, "nf") or isinstance(module, torch.nn.Embedding)
            inputs, outputs = module.weight.shape if is_turned else module.weight.shape[::-1]
            layer = _Linear4bit(module.bias, (outputs, inputs), step) if path in step.quantized else module
            if path in step.targets:
                layer = step.adapter.stand_in(layer, inputs, outputs, step.rank_of(path), step.dropout)
            _replace(base, path, layer)
    _train_parts(base, step.parts)


def _replace(base: Any, path: str, module: torch.nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)


def _train_parts(base: Any, parts: TrainedParts) -> None:
    """Put stand-ins for PEFT's wrappers on modules and rows that are trained, in place."""
    held = {path for path, _ in base.named_modules()}  # a model of fewer layers lacks some
    for path in sorted(parts.modules & held):
        module = base.get_submodule(path)
        trained = deepcopy(module).requires_grad_(True)
        _replace(base, path, _Whole(module, trained))
        if parts.tied is not None and isinstance(module, torch.nn.Embedding):
            _replace(base, parts.tied, _Whole(base.get_submodule(parts.tied), trained))
    for path, tokens in parts.rows:
        module = base.get_submodule(path)
        with torch.device("meta"):
            rows_RD = torch.nn.Parameter(torch.empty(len(tokens), module.weight.shape[1]))
        _replace(base, path, _Rows(module, rows_RD))
        if parts.tied is not None and not parts.modules and isinstance(module, torch.nn.Embedding):
            _replace(base, parts.tied, _Rows(base.get_submodule(parts.tied), rows_RD))


class _Whole(torch.nn.Module):
    """A stand-in for PEFT's wrapper around a module that is trained whole; `trained` may be another's copy."""

    def __init__(self, original: torch.nn.Module, trained: torch.nn.Module) -> None:
        super().__init__()
        self.original, self.trained = original, trained

    @property
    def weight(self) -> Any:
        return self.trained.weight

    def forward(self, x: torch.Tensor) -> Any:
        if isinstance(self.original, torch.nn.Linear):
            return torch.nn.functional.linear(x, self.weight, getattr(self.trained, "bias", None))
        return self.trained(x)


class _Rows(torch.nn.Module):
    """A stand-in for PEFT's wrapper around an embedding or a head of which some rows are trained."""

    def __init__(self, original: Any, rows_RD: torch.nn.Parameter) -> None:
        super().__init__()
        self.original, self.rows_RD = original, rows_RD

    @property
    def weight(self) -> Any:
        return self.original.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.device("meta"):
            index_R = torch.empty((len(self.rows_RD),), dtype=torch.int64)
        weight_VD = self.weight.index_copy(0, index_R, self.rows_RD.to(self.weight.dtype))
        if isinstance(self.original, torch.nn.Embedding):
            return torch.nn.functional.embedding(x, weight_VD, self.original.padding_idx)
        return torch.nn.functional.linear(x, weight_VD, self.original.bias)


class _Linear4bit(torch.nn.Module):
    """A stand-in for a linear layer of bitsandbytes."""

    is_4bit = True

    def __init__(self, bias: Any, shape_MK: tuple[int, int], step: Step) -> None:
        super().__init__()
        self.bias, self.shape_MK, self.step = bias, shape_MK, step

    def forward(self, x: torch.Tensor) -> Any:
        return _FourBit.apply(x, self.bias, self.shape_MK, self.step)  # type: ignore[no-untyped-call]


class _FourBit(torch.autograd.Function):
    """bitsandbytes' product with a 4-bit weight: dequantized whole, used, and dropped; nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: Any, shape_MK: tuple[int, int], step: Step) -> torch.Tensor:
        ctx.shape_MK, ctx.step = shape_MK, step
        output = x.new_empty((*x.shape[:-1], shape_MK[0]))
        if x.numel() // shape_MK[1] > FUSED_TOKENS:
            _dequantize(shape_MK, x.dtype, step, 2)
        _note_product(x, shape_MK)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        result = grad.new_empty((*grad.shape[:-1], ctx.shape_MK[1]))
        _dequantize(ctx.shape_MK, grad.dtype, ctx.step, 1)
        _note_product(grad, ctx.shape_MK[::-1])
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return result, bias, None, None


def _dequantize(shape_MK: tuple[int, int], dtype: torch.dtype, step: Step, copies: int) -> None:
    """Count the memory and work of a dequantized weight, and of its constants under double quantization."""
    weights = shape_MK[0] * shape_MK[1]
    blocks = weights // QUANT_BLOCK
    constants = 4 * blocks * copies if step.double_quant else 0
    trace = Trace.current()
    trace.hold("dequantized weights", weights * dtype.itemsize + constants)
    if step.double_quant:
        trace.note("memory", 0, 5 * blocks)
        trace.note("memory", 0, 8 * blocks)
    trace.note("memory", 0, weights * (0.5 + dtype.itemsize) + 4 * blocks)


def _note_product(x: torch.Tensor, shape_MK: tuple[int, int]) -> None:
    kind = str(x.dtype).removeprefix("torch.")
    rows = x.numel() // shape_MK[1]
    moved = (x.numel() + rows * shape_MK[0] + shape_MK[0] * shape_MK[1]) * x.element_size()
    Trace.current().note(kind, 2.0 * rows * shape_MK[0] * shape_MK[1], moved)
