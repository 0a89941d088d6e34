"""Passes recorded as CUDA graphs, by the shape of their batch.

A pass over a small batch takes the host longer to launch than the GPU to compute. A batch whose documents have the same
lengths as one before, and as many trained tokens, launches the same kernels on the same addresses; so the second time
it is recorded, and from then on replayed in one launch. What changes between steps (tokens, targets, weights, the seed
of dropout, the adapters themselves) is data the kernels read; the learning rate is the optimizer's. All graphs share
one pool of memory, since only one runs at a time. Of many different shapes none comes twice, and nothing is recorded.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from veneer.engine.fused.attention import Documents

MOST = 8  # graphs; their launches take some memory each


class Inputs(NamedTuple):
    """A batch on the device. N trained tokens.

    Attributes:
        ids_T: Tokens, int64.
        index_N: Where trained tokens' hidden states stand, int64.
        targets_N: What follows them, int64.
        weights_N: Weight of each in the loss, float32.
        factor_N: Weight times the step's scale, float32.
        documents: Their bounds.
    """

    ids_T: torch.Tensor
    index_N: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor
    factor_N: torch.Tensor
    documents: Documents


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
        self._seen: Counter[tuple[tuple[int, ...], int]] = Counter()
        self._recorded: dict[tuple[tuple[int, ...], int], _Recorded] = {}
        self._pool: Any = None

    def run(self, inputs: Inputs) -> torch.Tensor:
        """The pass, replayed where it can be."""
        key = inputs.documents.lengths, len(inputs.index_N)
        self._seen[key] += 1
        if key not in self._recorded:
            if self._seen[key] < 2 or len(self._recorded) == MOST:
                return self._compute(inputs)
            self._recorded[key] = self._record(inputs)
        recorded = self._recorded[key]
        for static, new in zip(recorded.inputs[:-1], inputs[:-1], strict=True):
            static.copy_(new)
        recorded.graph.replay()
        return recorded.total.clone()

    def _record(self, inputs: Inputs) -> _Recorded:
        # What the allocator holds for passes without a graph is of no use to the graph's own pool.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        static = inputs._replace(**{name: getattr(inputs, name).clone() for name in inputs._fields[:-1]})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            total = self._compute(static)
        return _Recorded(graph, static, total)
