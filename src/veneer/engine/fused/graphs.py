"""Records passes as CUDA graphs, by the shape of their batch.

A pass over a small batch takes the host longer to launch than the GPU to compute. A batch of a shape seen before
launches the same kernels on the same addresses; so the second time it is recorded, and from then on replayed in one
launch. What changes between steps (tokens, targets, weights, bounds of documents, the seed of dropout, the adapters
themselves) is data that the kernels read; the learning rate belongs to the optimizer.

Batches of documents of uneven lengths would hardly ever share a shape. So they are padded (`PassShape`): by one more
document without trained tokens, to one of 16 sizes between a power of two and the next; trained tokens to one of 8.
Packed rows then have a dozen shapes, and most passes are replayed; unpacked rows have some forty (`bench/replays.py`).
Where documents share a prompt, the keys are padded too, to one of 4 sizes.

All graphs share one pool of memory, since only one runs at a time. The largest pass is recorded first (`reserve`), so
that the others reuse its memory; recorded in rising order of size, each would add to the pool.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from veneer.data.batch import UNTRAINED, Batch
from veneer.engine.fused import cudnn
from veneer.engine.fused.documents import Documents, Keys
from veneer.engine.objective import Objective, StepOutput
from veneer.machine.device import to_device

MAX_GRAPHS = 32  # each takes some memory
SIZES = 16  # numbers of tokens between a power of two and the next
TRAINED = 8  # numbers of trained tokens, in the same way
KEYS = 4  # numbers of keys, in the same way
DOCUMENTS = 32  # the number of documents is rounded up to a multiple of this
LONGEST = 512  # tokens; the longest document counts as this many, or as the next power of two


class PassShape(NamedTuple):
    """The shape that decides the launches of a pass.

    Attributes:
        is_even: whether all documents are cut or packed to one length: such batches recur without padding.
        tokens: tokens of all documents.
        documents: number of documents, empty ones included.
        longest: tokens of the longest document, or more.
        trained: number of trained tokens.
        keys: number of keys; 0: that of tokens, since none is shared.
    """

    is_even: bool
    tokens: int
    documents: int
    longest: int
    trained: int
    keys: int = 0

    @staticmethod
    def of(lengths: Sequence[int], trained: int, shared: Sequence[int] = ()) -> "PassShape":
        """Return the shape to which a batch with so many trained tokens is padded; `shared` as in `Batch`."""
        tokens, longest, copies = sum(lengths) - sum(shared), max(lengths), sum(shared)
        is_even = len(set(lengths)) == 1 and longest % cudnn.BLOCK == 0 and longest >= cudnn.MIN_TOKENS and not copies
        documents, more = len(lengths), 0 if is_even else rounded(tokens) - tokens
        if not is_even:
            documents = -(-(documents + (more > 0)) // DOCUMENTS) * DOCUMENTS
            longest = 1 << (max(longest, more, LONGEST) - 1).bit_length()
        if trained < tokens + more:
            step = max(64, _power_of_2(tokens + more) // TRAINED)
            trained = -(-trained // step) * step
        keys = rounded(tokens + more + copies, KEYS) if copies else 0
        return PassShape(is_even, tokens + more, documents, longest, trained, keys)


class Inputs(NamedTuple):
    """A batch on the device. N trained tokens.

    Attributes:
        ids_T: tokens, int64.
        index_N: positions whose next token is trained, int64.
        targets_N: the trained tokens, int64.
        weights_N: weight of each in the loss, float32.
        factor_N: factor of each in the gradient that the head computes, float32.
        values: further inputs of the objective, by name; float32.
        documents: bounds of the documents.
        size: shape of the padded batch, which decides the launches.
    """

    ids_T: torch.Tensor
    index_N: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor
    factor_N: torch.Tensor
    values: dict[str, torch.Tensor]
    documents: Documents
    size: PassShape

    @staticmethod
    def of(batch: Batch, device: torch.device, switch: int | None, pads: bool, by_weight: bool = True) -> "Inputs":
        """Find the trained tokens on the host, so that nothing waits for the device, and move all to the device.

        Args:
            batch: batch on the host.
            device: device of the tensors.
            switch: argument of `Documents.of`.
            pads: whether to pad to sizes that recur.
            by_weight: whether the weights are the coefficients; else an objective gives these after the forward.
        """
        batch = _with_one_table(batch, switch)
        lengths, shared = list(batch.lengths), list(batch.shared) if any(batch.shared) else []
        per_row, batch = batch.documents_per_row, batch.without_shared()
        index_N = (batch.targets_T >= 0).nonzero().squeeze(1)
        ids_T, targets_N, weights_N = batch.ids_T, batch.targets_T[index_N], batch.weights_T[index_N]
        values = {name: value_T[index_N] for name, value_T in batch.values.items()}
        size = PassShape.of(lengths, len(index_N), shared)
        if pads:
            more = size.tokens - len(ids_T)
            untrained = len(ids_T) if more else _first_gap(index_N, len(ids_T))
            if more:
                ids_T = torch.cat([ids_T, ids_T.new_zeros(more)])
                lengths.append(more)
                shared += [0] if shared else []
            more = size.trained - len(index_N)
            index_N = torch.cat([index_N, index_N.new_full((more,), untrained or 0)])
            targets_N = torch.cat([targets_N, targets_N.new_full((more,), UNTRAINED)])
            weights_N = F.pad(weights_N, (0, more))
            values = {name: F.pad(value_N, (0, more)) for name, value_N in values.items()}
        documents = Documents.of(lengths, device, switch, shared)
        if shared:
            keys = Keys.of(lengths, shared, per_row, size.keys if pads else sum(lengths))
            documents = documents.with_keys(keys, device)
        if pads and not size.is_even:
            documents = documents.padded(size.documents, size.longest)
        factor_N = (weights_N if by_weight else torch.ones_like(weights_N)) * batch.scale
        tensors = [to_device(t, device) for t in (ids_T, index_N, targets_N, weights_N, factor_N)]
        values = {name: to_device(value_N, device) for name, value_N in sorted(values.items())}
        return Inputs._make([*tensors, values, documents, size])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self[:5], *self.documents.tensors, *self.values.values())

    def cloned(self) -> "Inputs":
        """Return a copy at addresses of its own."""
        tensors = [tensor.clone() for tensor in self.tensors]
        values = 5 + len(self.documents.tensors)
        documents = self.documents.with_tensors(tensors[5:values])
        return Inputs._make([*tensors[:5], dict(zip(self.values, tensors[values:], strict=True)), documents, self.size])


def _with_one_table(batch: Batch, switch: int | None) -> Batch:
    """Return a batch without what is shared by documents that have other rotary tables than the first of their row."""
    if switch is None or not batch.shared:
        return batch
    is_long = [length > switch for length in batch.lengths]
    firsts = [is_long[n // batch.documents_per_row * batch.documents_per_row] for n in range(len(is_long))]
    shared = tuple(s if is_long[n] == firsts[n] else 0 for n, s in enumerate(batch.shared))
    return replace(batch, shared=shared)


def rounded(count: int, sizes: int = SIZES) -> int:
    """Return the number of tokens that a batch of `count` is padded to, a multiple of 64."""
    step = max(64, _power_of_2(count) // sizes)
    return -(-count // step) * step


def _power_of_2(count: int) -> int:
    """Return the largest power of two that is not above `count`."""
    return 1 << (count.bit_length() - 1)


def _first_gap(index_N: torch.Tensor, tokens: int) -> int | None:
    """Return the first position that is not trained; None: all are."""
    if len(index_N) == tokens:
        return None
    gaps = (index_N != torch.arange(len(index_N))).nonzero()
    return int(gaps[0]) if len(gaps) else len(index_N)


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    output: StepOutput


class Graphs:
    """Records and replays `compute`.

    Args:
        compute: function that runs a pass for an objective, and never waits for the device.
        on_full: function that drops what a pass that ran out of memory has left.
    """

    def __init__(
        self, compute: Callable[[Inputs, Objective], StepOutput], on_full: Callable[[], object] = lambda: None
    ) -> None:
        self._compute, self._on_full = compute, on_full
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: Any = None
        self._largest: _Recorded | None = None
        self._is_full = False

    def reserve(self, inputs: Inputs, objective: Objective) -> None:
        """Record the largest pass; it is never replayed, but sizes the pool."""
        self._compute(inputs, objective)  # compiles the kernels, which cannot be done while recording
        self._largest = self._record(inputs, objective)

    def run(self, inputs: Inputs, objective: Objective, kind: Hashable = None) -> StepOutput:
        """Run a pass, replayed where it was recorded; passes of different `kind` launch different kernels."""
        key = inputs.size, objective, kind, tuple(inputs.values)
        self._seen[key] += 1
        if key not in self._recorded:
            launches = self._seen[key] < 2 or self._is_full or len(self._recorded) == MAX_GRAPHS
            recorded = None if launches else self._record(inputs, objective)
            if recorded is None:
                return self._compute(inputs, objective)
            self._recorded[key] = recorded
        recorded = self._recorded[key]
        for static, new in zip(recorded.inputs.tensors, inputs.tensors, strict=True):
            static.copy_(new)
        recorded.graph.replay()
        loss, weight, metrics = recorded.output
        return StepOutput(loss.clone(), weight.clone(), {name: value.clone() for name, value in metrics.items()})

    def _record(self, inputs: Inputs, objective: Objective) -> _Recorded | None:
        """Record a pass; None where it does not fit beside what the pool cannot reuse: it is launched from then on."""
        # A graph's pool cannot reuse memory that the allocator has cached for other passes.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        static = inputs.cloned()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                output = self._compute(static, objective)
        except RuntimeError as error:  # ending the recording fails too, in place of the error that spoiled it
            if not isinstance(error.__context__, torch.OutOfMemoryError):
                raise
            self._is_full = True
        if not self._is_full:
            return _Recorded(graph, static, output)
        self._on_full()  # what the error refers to is freed by now
        del graph, static
        torch.cuda.empty_cache()
        return None
