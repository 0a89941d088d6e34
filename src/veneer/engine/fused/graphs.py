"""Passes recorded as CUDA graphs, by the shape of their batch.

A pass over a small batch takes the host longer to launch than the GPU to compute. A batch of the same shape as one
before launches the same kernels on the same addresses; so the second time it is recorded, and from then on replayed in
one launch. What changes between steps (tokens, targets, weights, where documents begin, the seed of dropout, the
adapters themselves) is data the kernels read; the learning rate is the optimizer's.

Documents of uneven lengths would hardly ever come twice in one shape. So they are padded (`padded`): by one more
document that nothing is learned from, to one of 32 sizes between a power of two and the next; trained tokens
likewise. All graphs share one pool of memory, since only one runs at a time.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from veneer.data import Batch
from veneer.data.batch import UNTRAINED
from veneer.engine.fused.attention import Documents, bring

MOST = 8  # graphs; their launches take some memory each
SIZES = 32  # of tokens between a power of two and the next
DOCUMENTS = 32  # their number is rounded up to a multiple of this


class Inputs(NamedTuple):
    """A batch on the device. N trained tokens.

    Attributes:
        ids_T: Tokens, int64.
        index_N: Where trained tokens' hidden states stand, int64.
        targets_N: What follows them, int64.
        weights_N: Weight of each in the loss, float32.
        factor_N: Weight times the step's scale, float32.
        position_T, bounds: As in `documents`, which hold them too.
        documents: Their bounds.
    """

    ids_T: torch.Tensor
    index_N: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor
    factor_N: torch.Tensor
    position_T: torch.Tensor
    bounds: torch.Tensor
    documents: Documents

    @staticmethod
    def of(batch: Batch, scale: float, device: torch.device, switch: int | None, pads: bool) -> "Inputs":
        """What is trained is found on the host, so that nothing waits for the device.

        Args:
            batch: On the host.
            scale: Of the loss.
            device: Where it goes.
            switch: See `Documents.of`.
            pads: Whether to round up to sizes that come again.
        """
        index_N = (batch.targets_T >= 0).nonzero().squeeze(1)
        ids_T, targets_N, weights_N = batch.ids_T, batch.targets_T[index_N], batch.weights_T[index_N]
        lengths = batch.lengths
        if pads:
            more = 0 if len(set(lengths)) == 1 else rounded(len(ids_T)) - len(ids_T)
            if more:
                ids_T, lengths = torch.cat([ids_T, ids_T.new_zeros(more)]), (*lengths, more)
            untrained = len(batch.ids_T) if more else _first_gap(index_N, len(ids_T))
            more = rounded(len(index_N)) - len(index_N) if untrained is not None else 0
            index_N = torch.cat([index_N, index_N.new_full((more,), untrained or 0)])
            targets_N = torch.cat([targets_N, targets_N.new_full((more,), UNTRAINED)])
            weights_N = torch.cat([weights_N, weights_N.new_zeros(more)])
        documents = Documents.of(lengths, device, switch)
        if pads and not documents.is_even:
            documents = _rounded_documents(documents)
        tensors = [bring(t, device) for t in (ids_T, index_N, targets_N, weights_N, weights_N * scale)]
        return Inputs._make([*tensors, documents.position_T, documents.bounds, documents])

    @property
    def shape(self) -> Hashable:
        """What decides the launches of a pass."""
        known = self.documents
        packed = known.lengths if known.is_even else (len(self.ids_T), len(known.bounds), known.longest)
        return packed, len(self.index_N)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        tensors: tuple[torch.Tensor, ...] = tuple(self[:-1])  # all but the documents
        return tensors

    def cloned(self) -> "Inputs":
        """At addresses of its own."""
        tensors = [tensor.clone() for tensor in self.tensors]
        documents = self.documents._replace(position_T=tensors[-2], bounds=tensors[-1])
        return Inputs._make([*tensors, documents])


def rounded(count: int) -> int:
    """The next of the sizes that batches are padded to, a multiple of 64 at least."""
    step = max(64, (1 << (count.bit_length() - 1)) // SIZES)
    return -(-count // step) * step


def _rounded_documents(documents: Documents) -> Documents:
    """As many as the next multiple of `DOCUMENTS`, the last ones empty; the longest, as if a power of two."""
    bounds = documents.bounds
    missing = -len(documents.lengths) % DOCUMENTS
    longest = 1 << (documents.longest - 1).bit_length()
    return documents._replace(bounds=torch.cat([bounds, bounds[-1:].expand(missing)]), longest=longest)


def _first_gap(index_N: torch.Tensor, tokens: int) -> int | None:
    """The first token that is not trained; None: all are."""
    if len(index_N) == tokens:
        return None
    gaps = (index_N != torch.arange(len(index_N))).nonzero()
    return int(gaps[0]) if len(gaps) else len(index_N)


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    total: torch.Tensor


class Graphs:
    """Records and replays `compute`.

    Args:
        compute: A pass; launches on the device and never waits for it.
    """

    def __init__(self, compute: Callable[[Inputs], torch.Tensor]) -> None:
        self._compute = compute
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: Any = None

    def run(self, inputs: Inputs, kind: Hashable = None) -> torch.Tensor:
        """The pass, replayed where it can be; one of another kind does other work."""
        key = inputs.shape, kind
        self._seen[key] += 1
        if key not in self._recorded:
            if self._seen[key] < 2 or len(self._recorded) == MOST:
                return self._compute(inputs)
            self._recorded[key] = self._record(inputs)
        recorded = self._recorded[key]
        for static, new in zip(recorded.inputs.tensors, inputs.tensors, strict=True):
            static.copy_(new)
        recorded.graph.replay()
        return recorded.total.clone()

    def _record(self, inputs: Inputs) -> _Recorded:
        # What the allocator holds for passes without a graph is of no use to the graph's own pool.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        static = inputs.cloned()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            total = self._compute(static)
        return _Recorded(graph, static, total)
