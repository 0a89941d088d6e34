"""Attention within documents, through the fastest backend that can do what is asked.

cuDNN's is twice as fast as flash on a Hopper GPU, but wants rows of one length, in whole blocks, and no window
(`cudnn`); flash takes documents of any length, one behind the other. Neither caps its scores: for that there is
FlexAttention, compiled once. `plain` does all of it, in float32 and on any machine; it is what the others are tested
against.

All add in a fixed order, so that the same pass gives the same bits. Flash's backward does so only on request, and is
the slower for it: by 7% for documents of a few hundred tokens, by a third to two thirds for long ones.

Tensors on the meta device, on which a plan's dry run is made, go the way that those of the GPU planned for will go
(`PLANNED`), through torch's own account of what the kernels return; FlexAttention, which is compiled, is put down as
flash.

Shapes: T tokens, H query heads, K key heads, C dimensions of a head, B documents, L length of each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.deterministic

from veneer.engine.fused import cudnn
from veneer.kernels.rope import Heads, split_heads
from veneer.machine.device import bring

HOPPER = 9  # major compute capability from which cuDNN's is the faster one
PLANNED: ContextVar[int] = ContextVar("planned", default=HOPPER)  # that of the GPU which meta tensors stand for


FLEX_BLOCK = 128  # tokens


class Documents(NamedTuple):
    """Where documents begin and end in a packed batch.

    Attributes:
        lengths: Tokens of each.
        position_T: Each token's row in the rotary tables, int32.
        bounds: Where documents begin and end, int32, on the device.
        longest: Tokens of the longest, or more.
    """

    lengths: tuple[int, ...]
    position_T: torch.Tensor
    bounds: torch.Tensor
    longest: int

    @staticmethod
    def of(lengths: Sequence[int], device: Any, switch: int | None = None) -> "Documents":
        """Of documents of these lengths.

        Args:
            lengths: Tokens of each.
            device: Where the tensors go.
            switch: Documents longer than this have a rotary table of their own, that many rows further down.
        """
        starts = [switch if switch is not None and length > switch else 0 for length in lengths]
        positions = torch.cat([torch.arange(s, s + n, dtype=torch.int32) for s, n in zip(starts, lengths, strict=True)])
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Documents(tuple(lengths), bring(positions, device), bring(bounds, device), max(lengths))

    @property
    def is_even(self) -> bool:
        """Whether all are of one length."""
        return len(set(self.lengths)) == 1


class Attention(NamedTuple):
    """What a layer's attention is.

    Attributes:
        heads: Of q, k and v.
        scale: Of the scores.
        window: Tokens it looks back, itself included; 0: all.
        softcap: Of the scores; 0: none.
    """

    heads: Heads
    scale: float
    window: int
    softcap: float

    def backend(self, documents: Documents, like: torch.Tensor) -> str:
        """Which backend these documents get."""
        if not (like.is_cuda or like.is_meta) or like.dtype == torch.float32:
            return "plain"
        if self.softcap:
            return "flash" if like.is_meta else "flex"
        is_open = not self.window or documents.longest <= self.window
        major = PLANNED.get() if like.is_meta else torch.cuda.get_device_capability()[0]
        rows, length = len(documents.lengths), documents.lengths[0]
        if not (documents.is_even and is_open and major >= HOPPER and cudnn.takes(length, self.heads)):
            return "flash"
        return "cudnn" if like.is_meta or cudnn.is_able(rows, length, self.heads) else "flash"


def attend(qkv_TN: torch.Tensor, documents: Documents, kind: Attention) -> tuple[torch.Tensor, Any]:
    """Output, shape (T, H C), and what backward needs beside it."""
    q, k, v = split_heads(qkv_TN, kind.heads)
    T = len(qkv_TN)
    backend = kind.backend(documents, qkv_TN)
    if backend == "cudnn":
        B = len(documents.lengths)
        if qkv_TN.is_meta:
            rows = [_rows(x, B) for x in (q, k, v)]
            out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*rows, None, True, 0.0, True, False)
            return out.transpose(1, 2).reshape(T, -1), (out, lse)
        out, lse = cudnn.attend((q, k, v), B, kind.scale)
        return out.reshape(T, -1), (out, lse)
    if backend == "flash":
        out, *rest = torch.ops.aten._flash_attention_forward(
            q, k, v, documents.bounds, documents.bounds, documents.longest, documents.longest, 0.0, True, False,
            scale=kind.scale, window_size_left=kind.window - 1 if kind.window else None, window_size_right=0,
        )  # fmt: skip
        return out.reshape(T, -1), (out, *rest)
    if backend == "flex":
        rows = [_flex_rows(x) for x in (q, k, v)]
        with torch.enable_grad():
            out = _flex(rows, T, documents, kind)
        return out.detach().reshape(T, -1), (out, rows)
    return _plain(q, k, v, documents, kind).reshape(T, -1), None


def attend_backward(
    dout_TO: torch.Tensor,
    qkv_TN: torch.Tensor,
    saved: Any,
    documents: Documents,
    kind: Attention,
    workspace_bytes: int = cudnn.WORKSPACE_BYTES,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q (T, H, C), k and v (T, K, C); in so much memory, where that is for us to choose."""
    q, k, v = split_heads(qkv_TN, kind.heads)
    dout = torch.unflatten(dout_TO, 1, (-1, kind.heads.size))
    backend = kind.backend(documents, qkv_TN)
    if backend == "cudnn":
        if qkv_TN.is_meta:
            return _foreseen_backward(dout, (q, k, v), saved, kind, workspace_bytes)
        out, lse = saved
        return cudnn.attend_backward(dout, (q, k, v), out, lse, kind.scale, workspace_bytes)
    if backend == "flash":
        out, lse, state, unused, _ = saved
        with _fixed_order():
            grads = torch.ops.aten._flash_attention_backward(
                dout.contiguous(), q, k, v, out, lse, documents.bounds, documents.bounds, documents.longest,
                documents.longest, 0.0, True, state, unused, scale=kind.scale,
                window_size_left=kind.window - 1 if kind.window else None, window_size_right=0,
            )  # fmt: skip
        return tuple(grads)
    if backend == "flex":
        out, rows = saved
        return tuple(g[0].transpose(0, 1)[: len(dout)] for g in torch.autograd.grad(out, rows, dout))
    # In this thread: cuBLAS warns of any that has no CUDA context yet.
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(_plain(q, k, v, documents, kind), (q, k, v), dout)


def _rows(x_THC: torch.Tensor, rows: int) -> torch.Tensor:
    """(B, H, L, C), a view."""
    return torch.unflatten(x_THC, 0, (rows, -1)).transpose(1, 2)


def _foreseen_backward(
    dout: torch.Tensor, qkv: tuple[torch.Tensor, ...], saved: Any, kind: Attention, workspace_bytes: int
) -> tuple[torch.Tensor, ...]:
    """cuDNN's on meta tensors, with the memory it takes on the way."""
    out, lse = saved
    B, _, L = lse.shape[:3]
    call = cudnn.Call.of(B, L, kind.heads, workspace_bytes)
    workspace = dout.new_empty(call.workspace_bytes(L), dtype=torch.uint8)
    seed = dout.new_empty((), dtype=torch.int64)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _rows(dout, B), *(_rows(x, B) for x in qkv), out, lse, seed, seed, None, None, None, L, L, 0.0, True
    )
    del workspace
    return tuple(g.transpose(1, 2).flatten(0, 1) for g in grads)


@contextmanager
def _fixed_order() -> Iterator[None]:
    """Torch adds in a fixed order; it does not fill new memory besides, as it would by default."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = settings.fill_uninitialized_memory
    try:
        settings.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fills


def _flex_rows(x_THC: torch.Tensor) -> torch.Tensor:
    """(1, H, whole blocks of tokens, C), a leaf: torch's compiler warns of any other input that wants a gradient."""
    missing = _flex_blocks(len(x_THC)) * FLEX_BLOCK - len(x_THC)
    return F.pad(x_THC.detach(), (0, 0, 0, 0, 0, missing)).transpose(0, 1)[None].requires_grad_()


def _flex(rows: Sequence[torch.Tensor], tokens: int, documents: Documents, kind: Attention) -> torch.Tensor:
    """(T, H, C) by FlexAttention, of `_flex_rows` of q, k and v."""
    mask = _flex_mask(documents.lengths, kind.window, _flex_blocks(tokens), rows[0].device)
    with torch._dynamo.config.patch(specialize_float=True):  # cap and scale are constants, whatever else is dynamic
        out = _compiled_flex()(
            *rows, score_mod=_capped(kind.softcap), block_mask=mask, scale=kind.scale, enable_gqa=True
        )  # fmt: skip
    result: torch.Tensor = out[0].transpose(0, 1)[:tokens]
    return result


def _flex_blocks(tokens: int) -> int:
    """Blocks that hold so many tokens; at least two, since a size of one is compiled as a case of its own."""
    return max(2, -(-tokens // FLEX_BLOCK))


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # one kernel for all lengths


@lru_cache(maxsize=4)
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def cap(score: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@lru_cache(maxsize=4)
def _flex_mask(lengths: tuple[int, ...], window: int, blocks: int, device: torch.device) -> Any:
    """Which scores are computed: within documents, backwards, within the window. Shared by all layers of a kind.

    All that differs between batches and kinds of layer is a tensor, so that one compiled kernel serves them all. Which
    blocks are empty or full follows from it without making the scores' whole square.
    """
    from torch.nn.attention.flex_attention import BlockMask

    sizes = torch.tensor([*lengths, blocks * FLEX_BLOCK - sum(lengths)])
    first_T = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes).int()  # key that a query sees first
    if window:
        first_T = torch.maximum(first_T, torch.arange(1 - window, len(first_T) + 1 - window).int())
    number = torch.arange(blocks)
    begin = number * FLEX_BLOCK
    is_seen = (number <= number[:, None]) & (begin + FLEX_BLOCK > first_T[begin][:, None])
    is_full = (number < number[:, None]) & (begin >= first_T[begin + FLEX_BLOCK - 1][:, None])
    first_T = bring(first_T, device)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (key >= first_T[query])

    partial, full = (_listed(blocks_QK, device) for blocks_QK in (is_seen & ~is_full, is_full))
    return BlockMask.from_kv_blocks(*partial, *full, FLEX_BLOCK, sees)


def _listed(blocks_QK: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block has, and their numbers, in FlexAttention's shapes."""
    numbers = blocks_QK.int().argsort(dim=1, descending=True, stable=True)
    return bring(blocks_QK.sum(1).int()[None, None], device), bring(numbers.int()[None, None], device)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, kind: Attention) -> torch.Tensor:
    """Softmax attention written out, document by document, in float32."""
    outs, start = [], 0
    repeat = kind.heads.query // kind.heads.key
    for length in documents.lengths:
        part = slice(start, start + length)
        qs = q[part].float().transpose(0, 1)
        ks, vs = (x[part].float().transpose(0, 1).repeat_interleave(repeat, 0) for x in (k, v))
        scores = qs @ ks.mT * kind.scale
        if kind.softcap:
            scores = kind.softcap * torch.tanh(scores / kind.softcap)
        back = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)[None]
        seen = (back >= 0) & (back < (kind.window or length))
        outs.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ vs).transpose(0, 1))
        start += length
    return torch.cat(outs).to(q.dtype)
