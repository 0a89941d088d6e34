"""Attention of rows of one length by cuDNN, asked to add in a fixed order.

Torch calls the same kernels, but has no way to ask: its gradient of q is summed in whatever order programs come by, and
differs in its last bits from call to call. So plans are made here, by cuDNN's own frontend library, a dependency on
Linux; where that or a plan cannot be had, flash does the work.

In a fixed order, gradients of scores are written to memory and read again: rows x heads x length^2 numbers of 16 bits.
So backward goes over some rows and heads at a time, as many as its workspace holds; heads that share a key stay
together.
Each head's numbers are the same however they are grouped, but the fewer calls the faster (H100, 4 rows of 2,048 tokens,
32 heads: 0.99 ms in one call with 1.1 GiB, 1.26 in four with 0.3; torch's takes 0.94, `bench/attention.py`).

A plan takes a second to make, serves all layers and steps, and is never let go, since recorded passes use it. So only
rows of whole blocks come here: those that were cut or packed to a length, hardly ever those that have their own.

Shapes: T tokens, B rows of L, H query heads, K key heads, C dimensions of a head.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from veneer.config.notify import notify
from veneer.kernels.rope import Heads

WORKSPACE_BYTES = 320 * 2**20  # usual workspace of a call; one row of 2,048 tokens and 32 heads takes 288 MiB
MOST_BYTES = 2560 * 2**20  # of the smallest call: longer rows go through flash
BLOCK = 128  # tokens; gradients of scores are written in whole ones
LEAST = 256  # tokens


class Call(NamedTuple):
    """What a call of backward covers."""

    rows: int
    heads: Heads

    @staticmethod
    def of(rows: int, length: int, heads: Heads, most_bytes: int) -> "Call":
        """The largest whose workspace is within the bytes; where none is, the smallest."""
        group = heads.query // heads.key
        keys = [n for n in range(1, heads.key + 1) if heads.key % n == 0]
        calls = [Call(some, Heads(group * n, n, heads.size)) for some in (1, rows) for n in keys]
        calls.sort(key=lambda call: call.workspace_bytes(length))
        fitting = [call for call in calls if call.workspace_bytes(length) <= most_bytes]
        return fitting[-1] if fitting else calls[0]

    def workspace_bytes(self, length: int) -> int:
        """Gradients of scores, sums of rows, and gradients of shared keys and values before they are added up."""
        shared = 4 * self.heads.size * length if self.heads.query != self.heads.key else 0
        return self.rows * self.heads.query * (2 * length * length + shared + 4 * length)


class Layout(NamedTuple):
    """What a plan is made for.

    Attributes:
        call: Rows and heads.
        length: Of each row.
        scale: Of the scores.
        qkv, out, dout: Numbers from one token to the next.
        heads: Of the tensors that a call covers a part of.
    """

    call: Call
    length: int
    scale: float
    qkv: int
    out: int
    dout: int
    heads: Heads


class Plan(NamedTuple):
    """A graph that cuDNN has compiled, its tensors, and the memory it needs beside them."""

    graph: Any
    tensors: tuple[Any, ...]
    workspace_bytes: int


def takes(length: int, heads: Heads) -> bool:
    """Whether rows this long, which see all that is before them, come here on a GPU that can."""
    is_whole = length % BLOCK == 0 and length >= LEAST and heads.size % 8 == 0 and heads.size <= 128
    return is_whole and Call.of(1, length, heads, 0).workspace_bytes(length) <= MOST_BYTES


@cache
def is_able(rows: int, length: int, heads: Heads) -> bool:
    """Whether the current GPU has plans for such rows, in bfloat16."""
    token, out = (heads.query + 2 * heads.key) * heads.size, heads.query * heads.size
    try:
        for plan, call in (
            (_forward, Call(rows, heads)),
            (_backward, Call.of(rows, length, heads, WORKSPACE_BYTES)),
        ):
            plan(Layout(call, length, heads.size**-0.5, token, out, out, heads), torch.cuda.current_device())
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError) as error:  # the last two: of other versions
        reason = str(error).strip().splitlines() or [type(error).__name__]
        text = f"attention goes through flash, which is slower: cuDNN has no plan for rows of {length} tokens"
        notify(f"{text} ({reason[0]})")
        return False
    return True


def attend(qkv: tuple[torch.Tensor, ...], rows: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (T, H, C) and its log-sum-exp (B, H, L), float32, of q (T, H, C), k and v (T, K, C)."""
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
    most_bytes: int = WORKSPACE_BYTES,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q (T, H, C), k and v (T, K, C), taking so much memory on the way, if that is enough."""
    B, H, L = lse.shape
    K, C = qkv[1].shape[1:]
    call = Call.of(B, L, Heads(H, K, C), most_bytes)
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
    """On the current stream; may be recorded."""
    import cudnn

    device = tensors[0].device
    handle = _handle(device.index)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    workspace = torch.empty(max(1, plan.workspace_bytes), dtype=torch.uint8, device=device)
    plan.graph.execute(dict(zip(plan.tensors, tensors, strict=True)), workspace, handle=handle)


class _Builder:
    """A graph in the making."""

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
        """Of a tensor with so many heads, and so many numbers from one token to the next."""
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
        """Raises RuntimeError where cuDNN refuses."""
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
