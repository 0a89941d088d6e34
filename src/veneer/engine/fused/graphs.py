"""Passes recorded as CUDA graphs, by the shape of their batch.

A pass over a small batch takes the host longer to launch than the GPU to compute. A batch of the same shape as one
before launches the same kernels on the same addresses; so the second time it is recorded, and from then on replayed in
one launch. What changes between steps (tokens, targets, weights, where documents begin, the seed of dropout, the
adapters themselves) is data the kernels read; the learning rate is the optimizer's.

Documents of uneven lengths would hardly ever come twice in one shape. So batches are padded (`Size`): by one more
document that nothing is learned from, to one of 16 sizes between a power of two and the next; trained tokens to one of
8. Of packed rows that leaves a dozen shapes, and most passes are replayed; of rows by themselves some forty
(`bench/replays.py`).

All graphs share one pool of memory, since only one runs at a time. The largest pass is recorded first (`lay_out`): what
the others need is then a part of what it left, where pass after larger pass would each add to it.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from veneer.data.batch import UNTRAINED, Batch
from veneer.engine.fused import cudnn
from veneer.engine.fused.attention import Documents
from veneer.engine.objective import Objective, StepOutput
from veneer.machine.device import bring

MOST = 32  # graphs; their launches take some memory each
SIZES = 16  # of tokens between a power of two and the next
TRAINED = 8  # of trained ones, in so many parts of that power of two
DOCUMENTS = 32  # their number is rounded up to a multiple of this
LONGEST = 512  # tokens; the longest of a batch counts as this, or as the next power of two


class Size(NamedTuple):
    """What decides the launches of a pass.

    Attributes:
        is_even: Whether all documents are of one length, and cut or packed to it: such batches come again as they are.
        tokens: Of all documents.
        documents: How many, the empty ones included.
        longest: Tokens of the longest, or more.
        trained: Tokens.
    """

    is_even: bool
    tokens: int
    documents: int
    longest: int
    trained: int

    @staticmethod
    def of(lengths: Sequence[int], trained: int) -> "Size":
        """That to which a batch with so many trained tokens is padded."""
        tokens, longest = sum(lengths), max(lengths)
        is_even = len(set(lengths)) == 1 and longest % cudnn.BLOCK == 0 and longest >= cudnn.LEAST
        documents, more = len(lengths), 0 if is_even else rounded(tokens) - tokens
        if not is_even:
            documents = -(-(documents + (more > 0)) // DOCUMENTS) * DOCUMENTS
            longest = 1 << (max(longest, more, LONGEST) - 1).bit_length()
        if trained < tokens + more:
            step = max(64, _power_of_2(tokens + more) // TRAINED)
            trained = -(-trained // step) * step
        return Size(is_even, tokens + more, documents, longest, trained)


class Inputs(NamedTuple):
    """A batch on the device. N trained tokens.

    Attributes:
        ids_T: Tokens, int64.
        index_N: Where trained tokens' hidden states stand, int64.
        targets_N: What follows them, int64.
        weights_N: Weight of each in the loss, float32.
        factor_N: What each counts in the gradient as the head computes it, float32.
        values: What an objective needs beside, by name; float32.
        documents: Their bounds.
        size: What decides the launches, where it was padded.
    """

    ids_T: torch.Tensor
    index_N: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor
    factor_N: torch.Tensor
    values: dict[str, torch.Tensor]
    documents: Documents
    size: Size

    @staticmethod
    def of(batch: Batch, device: torch.device, switch: int | None, pads: bool, by_weight: bool = True) -> "Inputs":
        """What is trained is found on the host, so that nothing waits for the device.

        Args:
            batch: On the host.
            device: Where it goes.
            switch: See `Documents.of`.
            pads: Whether to round up to sizes that come again.
            by_weight: Whether the weights are coefficients already; else those of an objective come later.
        """
        index_N = (batch.targets_T >= 0).nonzero().squeeze(1)
        ids_T, targets_N, weights_N = batch.ids_T, batch.targets_T[index_N], batch.weights_T[index_N]
        values = {name: value_T[index_N] for name, value_T in batch.values.items()}
        lengths, size = batch.lengths, Size.of(batch.lengths, len(index_N))
        if pads:
            more = size.tokens - len(ids_T)
            untrained = len(ids_T) if more else _first_gap(index_N, len(ids_T))
            if more:
                ids_T, lengths = torch.cat([ids_T, ids_T.new_zeros(more)]), (*lengths, more)
            more = size.trained - len(index_N)
            index_N = torch.cat([index_N, index_N.new_full((more,), untrained or 0)])
            targets_N = torch.cat([targets_N, targets_N.new_full((more,), UNTRAINED)])
            weights_N = F.pad(weights_N, (0, more))
            values = {name: F.pad(value_N, (0, more)) for name, value_N in values.items()}
        documents = Documents.of(lengths, device, switch)
        if pads and not size.is_even:
            empty = documents.bounds[-1:].expand(size.documents - len(lengths))
            documents = documents._replace(bounds=torch.cat([documents.bounds, empty]), longest=size.longest)
        factor_N = (weights_N if by_weight else torch.ones_like(weights_N)) * batch.scale
        tensors = [bring(t, device) for t in (ids_T, index_N, targets_N, weights_N, factor_N)]
        values = {name: bring(value_N, device) for name, value_N in values.items()}
        return Inputs._make([*tensors, values, documents, size])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self[:5], self.documents.position_T, self.documents.bounds, *self.values.values())

    def cloned(self) -> "Inputs":
        """At addresses of its own."""
        tensors = [tensor.clone() for tensor in self.tensors]
        documents = self.documents._replace(position_T=tensors[5], bounds=tensors[6])
        return Inputs._make([*tensors[:5], dict(zip(self.values, tensors[7:], strict=True)), documents, self.size])


def rounded(count: int) -> int:
    """The next of the sizes that batches are padded to, a multiple of 64 at least."""
    step = max(64, _power_of_2(count) // SIZES)
    return -(-count // step) * step


def _power_of_2(count: int) -> int:
    """The largest that is not above."""
    return 1 << (count.bit_length() - 1)


def _first_gap(index_N: torch.Tensor, tokens: int) -> int | None:
    """The first token that is not trained; None: all are."""
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
        compute: A pass for an objective; launches on the device and never waits for it.
    """

    def __init__(self, compute: Callable[[Inputs, Objective], StepOutput]) -> None:
        self._compute = compute
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: Any = None
        self._largest: _Recorded | None = None

    def lay_out(self, inputs: Inputs, objective: Objective) -> None:
        """Record the largest pass; it is not replayed, but holds the pool."""
        self._compute(inputs, objective)  # so that kernels are there: none can be compiled while a pass is recorded
        self._largest = self._record(inputs, objective)

    def run(self, inputs: Inputs, objective: Objective, kind: Hashable = None) -> StepOutput:
        """The pass, replayed where it can be; one of another kind does other work."""
        key = inputs.size, objective, kind
        self._seen[key] += 1
        if key not in self._recorded:
            if self._seen[key] < 2 or len(self._recorded) == MOST:
                return self._compute(inputs, objective)
            self._recorded[key] = self._record(inputs, objective)
        recorded = self._recorded[key]
        for static, new in zip(recorded.inputs.tensors, inputs.tensors, strict=True):
            static.copy_(new)
        recorded.graph.replay()
        loss, weight, metrics = recorded.output
        return StepOutput(loss.clone(), weight.clone(), {name: value.clone() for name, value in metrics.items()})

    def _record(self, inputs: Inputs, objective: Objective) -> _Recorded:
        # What the allocator holds for passes without a graph is of no use to the graph's own pool.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        static = inputs.cloned()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._compute(static, objective)
        return _Recorded(graph, static, output)
