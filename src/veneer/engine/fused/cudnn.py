"""Computes attention of rows of one length by cuDNN, with deterministic sums.

Torch calls the same kernels, but has no option for it: its gradient of q is summed in whatever order programs finish,
and differs in its last bits from call to call. So plans are built here, by cuDNN's own frontend library, a dependency
on Linux; where that or a plan is not available, flash is used.

In a fixed order, gradients of scores are written to memory and read again: rows x heads x length^2 numbers of 16 bits.
So backward goes over some rows and heads at a time, as many as its workspace holds; heads that share a key stay
together. Each head's numbers are the same however they are grouped, but fewer calls are faster (H100, 4 rows of 2,048
tokens, 32 heads: 0.99 ms in one call with 1.1 GiB, 1.26 in four with 0.3; torch's takes 0.94, `bench/attention.py`).

A plan takes a second to build, serves all layers and steps, and is never freed, since recorded passes use it. So only
rows of whole blocks are taken: rows that were cut or packed to one length.

Shapes: T tokens, B rows of L, H query heads, K key heads, C dimensions of a head.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from veneer.config.notify import notify
from veneer.kernels.rope import Heads

WORKSPACE_BYTES = 320 * 2**20  # usual workspace of a call; one row of 2,048 tokens and 32 heads takes 288 MiB
MAX_BYTES = 2560 * 2**20  # workspace of the smallest call; rows that need more go through flash
BLOCK = 128  # tokens; gradients of scores are written in whole blocks
MIN_TOKENS = 256  # shorter rows go through flash


class Call(NamedTuple):
    """The rows and heads that one call of backward covers."""

    rows: int
    heads: Heads

    @staticmethod
    def of(rows: int, length: int, heads: Heads, max_bytes: int) -> "Call":
        """Return the largest call whose workspace fits, or the smallest where none does."""
        group = heads.query // heads.key
        keys = [n for n in range(1, heads.key + 1) if heads.key % n == 0]
        calls = [Call(some, Heads(group * n, n, heads.size)) for some in (1, rows) for n in keys]
        calls.sort(key=lambda call: call.workspace_bytes(length))
        fitting = [call for call in calls if call.workspace_bytes(length) <= max_bytes]
        return fitting[-1] if fitting else calls[0]

    def workspace_bytes(self, length: int) -> int:
        """Return the bytes of score gradients, row sums, and gradients of shared keys and values before their sum."""
        shared = 4 * self.heads.size * length if self.heads.query != self.heads.key else 0
        return self.rows * self.heads.query * (2 * length * length + shared + 4 * length)


class Layout(NamedTuple):
    """The tensors and the call that a plan is built for.

    Attributes:
        call: rows and heads.
        length: tokens of each row.
        scale: factor of the scores.
        qkv, out, dout: strides of a token.
        heads: heads of the whole tensors, of which a call covers a part.
    """

    call: Call
    length: int
    scale: float
    qkv: int
    out: int
    dout: int
    heads: Heads


class Plan(NamedTuple):
    """A graph compiled by cuDNN, its tensors, and its workspace."""

    graph: Any
    tensors: tuple[Any, ...]
    workspace_bytes: int


def takes(length: int, heads: Heads) -> bool:
    """Return whether causal rows of this length go through cuDNN on a GPU that supports it."""
    is_whole = length % BLOCK == 0 and length >= MIN_TOKENS and heads.size % 8 == 0 and heads.size <= 128
    return is_whole and Call.of(1, length, heads, 0).workspace_bytes(length) <= MAX_BYTES


@cache
def is_able(rows: int, length: int, heads: Heads) -> bool:
    """Return whether the current GPU has bfloat16 plans for such rows."""
    token, out = (heads.query + 2 * heads.key) * heads.size, heads.query * heads.size
    try:
        for plan, call in (
            (_forward, Call(rows, heads)),
            (_backward, Call.of(rows, length, heads, WORKSPACE_BYTES)),
        ):
            plan(Layout(call, length, heads.size**-0.5, token, out, out, heads), torch.cuda.current_device())
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError) as error:  # last two: other versions
        reason = str(error).strip().splitlines() or [type(error).__name__]
        text = f"attention goes through flash, which is slower: cuDNN has no plan for rows of {length} tokens"
        notify(f"{text} ({reason[0]})")
        return False
    return True


def attend(qkv: tuple[torch.Tensor, ...], rows: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (T, H, C) and its log-sum-exp (B, H, L), float32, of q (T, H, C), k and v (T, K, C)."""
    q, k, _ = qkv
    T, H, C = q.shape
    heads, length = Heads(H, k.shape[1], C), T // rows
    out, lse = q.new_empty((T, H, C)), q.new_empty((rows, H, length), dtype=torch.float32)
    layout = Layout(Call(rows, heads), length, scale, q.stride(0), H * C, H * C, heads)
    _run(_forward(layout, q.device.index), (*qkv, out, lse))
    return out, lse


def attend_backward(
    dout: torch.Tensor,
    qkv: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    max_bytes: int = WORKSPACE_BYTES,
) -> tuple[torch.Tensor, ...]:
    """Return gradients of q (T, H, C), k and v (T, K, C), with at most so much workspace where that suffices."""
    B, H, L = lse.shape
    K, C = qkv[1].shape[1:]
    call = Call.of(B, L, Heads(H, K, C), max_bytes)
    layout = Layout(call, L, scale, qkv[0].stride(0), out.stride(0), dout.stride(0), Heads(H, K, C))
    plan = _backward(layout, dout.device.index)
    grads = tuple(x.new_empty(x.shape) for x in qkv)
    by_query, by_key = (qkv[0], out, dout, grads[0]), (*qkv[1:], *grads[1:])
    for row in range(0, B, call.rows):
        tokens = slice(row * L, (row + call.rows) * L)
        for at in range(0, K, call.heads.key):
            keys = slice(at, at + call.heads.key)
            queries = slice(at * (H // K), (at + call.heads.key) * (H // K))
            q, o, do, dq = (x[tokens, queries] for x in by_query)
            k, v, dk, dv = (x[tokens, keys] for x in by_key)
            _run(plan, (q, k, v, o, do, lse[row : row + call.rows, queries], dq, dk, dv))
    return grads


@cache
def _handle(device: int) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


def _run(plan: Plan, tensors: tuple[torch.Tensor, ...]) -> None:
    """Execute a plan on the current CUDA stream; the launch may be recorded."""
    import cudnn

    device = tensors[0].device
    handle = _handle(device.index)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    workspace = torch.empty(max(1, plan.workspace_bytes), dtype=torch.uint8, device=device)
    plan.graph.execute(dict(zip(plan.tensors, tensors, strict=True)), workspace, handle=handle)


class _Builder:
    """Builds a graph."""

    def __init__(self, layout: Layout, device: int) -> None:
        import cudnn

        self._kinds, self._modes, self._layout = cudnn.data_type, cudnn.heur_mode, layout
        self._refusal = cudnn.cudnnGraphNotSupportedError
        kinds = {"intermediate_data_type": self._kinds.FLOAT, "compute_data_type": self._kinds.FLOAT}
        self.graph = cudnn.pygraph(io_data_type=self._kinds.BFLOAT16, handle=_handle(device), **kinds)
        some = layout.call.heads
        self.queries, self.keys = some.query, some.key
        self.qkv = [self.takes(self.shape(heads, layout.qkv)) for heads in (some.query, some.key, some.key)]
        self.common = {"attn_scale": layout.scale, "use_causal_mask": True}

    def shape(self, heads: int, token: int) -> "_Shape":
        """Return the shape of a tensor with so many heads, and the given stride of a token."""
        (rows, some), L = self._layout.call, self._layout.length
        return _Shape(self._kinds.BFLOAT16, (rows, heads, L, some.size), (L * token, some.size, token, 1))

    @property
    def lse_shape(self) -> "_Shape":
        (rows, some), L = self._layout.call, self._layout.length
        return _Shape(self._kinds.FLOAT, (rows, some.query, L, 1), (self._layout.heads.query * L, L, 1, 1))

    def takes(self, shape: "_Shape") -> Any:
        return self.graph.tensor(data_type=shape.kind, dim=shape.dim, stride=shape.stride)

    def gives(self, tensor: Any, shape: "_Shape") -> None:
        tensor.set_output(True).set_data_type(shape.kind).set_dim(shape.dim).set_stride(shape.stride)

    def plan(self, *tensors: Any) -> Plan:
        """Compile the graph. Raises RuntimeError where cuDNN does not support it."""
        try:
            self.graph.build([self._modes.A])
        except (self._refusal, ValueError) as error:
            raise RuntimeError(f"cuDNN: {error}") from error
        return Plan(self.graph, tensors, self.graph.get_workspace_size())


class _Shape(NamedTuple):
    kind: Any
    dim: tuple[int, ...]
    stride: tuple[int, ...]


@cache
def _forward(layout: Layout, device: int) -> Plan:
    new = _Builder(layout, device)
    q, k, v = new.qkv
    out, lse = new.graph.sdpa(q=q, k=k, v=v, generate_stats=True, name="attention", **new.common)
    new.gives(out, new.shape(new.queries, layout.out))
    new.gives(lse, new.lse_shape)
    return new.plan(q, k, v, out, lse)


@cache
def _backward(layout: Layout, device: int) -> Plan:
    new, whole = _Builder(layout, device), layout.heads
    q, k, v = new.qkv
    out, dout = (new.takes(new.shape(new.queries, token)) for token in (layout.out, layout.dout))
    lse = new.takes(new.lse_shape)
    grads = new.graph.sdpa_backward(
        q=q, k=k, v=v, o=out, dO=dout, stats=lse, use_deterministic_algorithm=True, name="backward", **new.common
    )
    shapes = [new.shape(new.queries, whole.query * whole.size)] + [new.shape(new.keys, whole.key * whole.size)] * 2
    for gradient, shape in zip(grads, shapes, strict=True):
        new.gives(gradient, shape)
    return new.plan(q, k, v, out, dout, lse, *grads)
