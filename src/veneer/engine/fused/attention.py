"""Computes attention within documents, through the fastest backend that supports the case.

FlashAttention-4 (`flash4`), where it is installed, is fastest for all but short rows of one length, for which cuDNN is
(`cudnn`, in whole blocks, without a window), and short documents, for which flash is, which comes with torch. Without
FlashAttention-4 cuDNN takes all rows of one length, and flash the others, in up to 2.7 times as long. These two do not
cap their scores: for that there is FlexAttention, compiled once. `plain` supports everything, in float32 and on any
machine; the others are tested against it.

All sum in a fixed order, so that the same pass gives the same bits. Flash's backward does so only on request, which
makes it slower: by 7% for documents of a few hundred tokens, by a third to two thirds for long ones; FlashAttention-4's
by 5 to 15%.

Tensors on the meta device, in a plan's dry run, take the backend of the GPU that is planned for (`PLANNED`), through
torch's own meta kernels; FlexAttention, which is compiled, is counted as flash.

Documents that share a prompt (`documents.Keys`) go through any backend but cuDNN and FlexAttention: these take other
bounds for keys than for queries, with the last query of a document at its last key.

Shapes: T tokens, S keys, H query heads, K key heads, C dimensions of a head, B documents, L length of each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.deterministic

from veneer.engine.fused import cudnn, flash4
from veneer.engine.fused.documents import Documents
from veneer.kernels.rope import Heads, split_heads
from veneer.machine.device import to_device

HOPPER = 9  # major compute capability from which cuDNN's attention is faster
# Tokens up to which others are as fast as FlashAttention-4 or faster (`bench/attention_backends.py`): of rows of one
# length, which go through cuDNN, and of uneven documents, which go through flash.
SHORT = 2048
SHORT_DOCUMENTS = 512
PLANNED: ContextVar[int] = ContextVar("planned", default=HOPPER)  # capability of the planned GPU, for meta tensors
FLEX_BLOCK = 128  # tokens of a block of FlexAttention's mask


class Attention(NamedTuple):
    """The attention of a layer.

    Attributes:
        heads: heads of q, k and v.
        scale: factor of the scores.
        window: tokens that a query sees, its own included; 0: all.
        softcap: soft cap of the scores; 0: none.
    """

    heads: Heads
    scale: float
    window: int
    softcap: float

    def backend(self, documents: Documents, like: torch.Tensor) -> str:
        """Return the backend that these documents take."""
        if not (like.is_cuda or like.is_meta) or like.dtype == torch.float32:
            return "plain"
        major = _capability(like)
        is_short = documents.is_even and documents.lengths[0] <= SHORT
        if is_short and self._goes_through_cudnn(documents, like, major):
            return "cudnn"
        is_worth_it = documents.longest > SHORT_DOCUMENTS or bool(self.softcap)
        if is_worth_it and self._goes_through_flash4(like, major):
            return "flash4"
        if self.softcap:
            return "flash" if like.is_meta else "flex"
        return "cudnn" if self._goes_through_cudnn(documents, like, major) else "flash"

    def shares_keys(self, like: torch.Tensor) -> bool:
        """Return whether documents may have keys of others."""
        if not self.softcap or like.dtype == torch.float32 or not (like.is_cuda or like.is_meta):
            return True
        return self._goes_through_flash4(like, _capability(like))

    def depends_on_shapes(self, like: torch.Tensor) -> bool:
        """Return whether its kernels take all that differs between batches of one shape from tensors on the device."""
        major = _capability(like) if like.is_meta or like.is_cuda else 0
        return like.dtype != torch.float32 and (not self.softcap or self._goes_through_flash4(like, major))

    def _goes_through_flash4(self, like: torch.Tensor, major: int) -> bool:
        return flash4.takes(self.heads.size, major) and (like.is_meta or flash4.is_able(*self.heads, *self[2:]))

    def _goes_through_cudnn(self, documents: Documents, like: torch.Tensor, major: int) -> bool:
        rows, length = len(documents.lengths), documents.lengths[0]
        is_open = not self.softcap and (not self.window or documents.longest <= self.window)
        if not (documents.is_even and is_open and major >= HOPPER and cudnn.takes(length, self.heads)):
            return False
        return like.is_meta or cudnn.is_able(rows, length, self.heads)

    def scores(self, documents: Documents) -> flash4.Scores:
        """Return the arguments of FlashAttention-4; a window that no document exceeds is none."""
        return flash4.Scores(self.scale, self.window if documents.longest > self.window else 0, self.softcap)


def _capability(like: torch.Tensor) -> int:
    """Return the major compute capability of the GPU, or of the one that is planned for."""
    return PLANNED.get() if like.is_meta else torch.cuda.get_device_capability()[0]


def _split(qkv_TN: torch.Tensor, documents: Documents, kind: Attention) -> tuple[torch.Tensor, ...]:
    """Return q (T, H, C), and k and v, of all keys; (S, K, C), or (T, K, C) where none is shared."""
    q, k, v = split_heads(qkv_TN, kind.heads)
    if documents.keys is None:
        return q, k, v
    kv_SN = documents.keys.gather(qkv_TN[:, kind.heads.query * kind.heads.size :])
    k, v = torch.unflatten(kv_SN, 1, (2, -1, kind.heads.size)).unbind(1)
    return q, k, v


def attend(qkv_TN: torch.Tensor, documents: Documents, kind: Attention) -> tuple[torch.Tensor, Any]:
    """Return the output, shape (T, H C), and the tensors that backward needs beside it."""
    q, k, v = _split(qkv_TN, documents, kind)
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
    if backend == "flash4":
        out, lse = flash4.attend(q, k, v, documents.span, kind.scores(documents))
        return out.reshape(T, -1), (out, lse)
    if backend == "flash":
        out, *rest = torch.ops.aten._flash_attention_forward(
            q, k, v, documents.bounds, documents.key_bounds, documents.longest, documents.longest, 0.0, True, False,
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
    """Return gradients of q (T, H, C), k and v (T, K, C); `workspace_bytes` limits cuDNN's workspace."""
    qkv = _split(qkv_TN, documents, kind)
    dq, dk, dv = _backward(dout_TO, qkv, saved, documents, kind, workspace_bytes)
    del qkv
    if (keys := documents.keys) is not None:
        dk, dv = keys.add_copies(dk), keys.add_copies(dv)
    return dq, dk, dv


def _backward(
    dout_TO: torch.Tensor,
    qkv: tuple[torch.Tensor, ...],
    saved: Any,
    documents: Documents,
    kind: Attention,
    workspace_bytes: int,
) -> tuple[torch.Tensor, ...]:
    """Return gradients of q (T, H, C), and of k and v as the backend has read them."""
    q, k, v = qkv
    dout = torch.unflatten(dout_TO, 1, (-1, kind.heads.size))
    backend = kind.backend(documents, q)
    if backend == "cudnn":
        if q.is_meta:
            return _meta_backward(dout, (q, k, v), saved, kind, workspace_bytes)
        out, lse = saved
        return cudnn.attend_backward(dout, (q, k, v), out, lse, kind.scale, workspace_bytes)
    if backend == "flash4":
        out, lse = saved
        dout = dout.contiguous()
        return flash4.attend_backward(dout, (q, k, v), out, lse, documents.span, kind.scores(documents))
    if backend == "flash":
        out, lse, state, unused, _ = saved
        with _fixed_order():
            grads = torch.ops.aten._flash_attention_backward(
                dout.contiguous(), q, k, v, out, lse, documents.bounds, documents.key_bounds, documents.longest,
                documents.longest, 0.0, True, state, unused, scale=kind.scale,
                window_size_left=kind.window - 1 if kind.window else None, window_size_right=0,
            )  # fmt: skip
        return tuple(grads)
    if backend == "flex":
        out, rows = saved
        return tuple(g[0].transpose(0, 1)[: len(dout)] for g in torch.autograd.grad(out, rows, dout))
    # In this thread, since cuBLAS warns in threads that have no CUDA context yet.
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(_plain(q, k, v, documents, kind), (q, k, v), dout)


def _rows(x_THC: torch.Tensor, rows: int) -> torch.Tensor:
    """View as (B, H, L, C)."""
    return torch.unflatten(x_THC, 0, (rows, -1)).transpose(1, 2)


def _meta_backward(
    dout: torch.Tensor, qkv: tuple[torch.Tensor, ...], saved: Any, kind: Attention, workspace_bytes: int
) -> tuple[torch.Tensor, ...]:
    """Allocate on meta tensors what cuDNN's backward allocates, workspace included."""
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
    """Within the context, torch's kernels are deterministic, without filling new memory, which is its default then."""
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
    """Pad to (1, H, whole blocks, C), as a leaf: torch.compile warns of other inputs that require a gradient."""
    missing = _flex_blocks(len(x_THC)) * FLEX_BLOCK - len(x_THC)
    return F.pad(x_THC.detach(), (0, 0, 0, 0, 0, missing)).transpose(0, 1)[None].requires_grad_()


def _flex(rows: Sequence[torch.Tensor], tokens: int, documents: Documents, kind: Attention) -> torch.Tensor:
    """Compute (T, H, C) by FlexAttention from `_flex_rows` of q, k and v."""
    mask = _flex_mask(documents.lengths, kind.window, _flex_blocks(tokens), rows[0].device)
    with torch._dynamo.config.patch(specialize_float=True):  # cap and scale are constants, whatever else is dynamic
        out = _compiled_flex()(
            *rows, score_mod=_capped(kind.softcap), block_mask=mask, scale=kind.scale, enable_gqa=True
        )  # fmt: skip
    result: torch.Tensor = out[0].transpose(0, 1)[:tokens]
    return result


def _flex_blocks(tokens: int) -> int:
    """Return the number of blocks; at least two, since torch.compile specializes on a size of one."""
    return max(2, -(-tokens // FLEX_BLOCK))


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # one kernel for all lengths


@lru_cache(maxsize=4)
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def cap(score: torch.Tensor, *position: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@lru_cache(maxsize=4)
def _flex_mask(lengths: tuple[int, ...], window: int, blocks: int, device: torch.device) -> Any:
    """Mask scores to those within a document, causal and within the window. Shared by all layers of a kind.

    All that differs between batches and kinds of layer is in a tensor, so that one compiled kernel serves them all.
    Empty and full blocks follow from it without making the whole square of scores.
    """
    from torch.nn.attention.flex_attention import BlockMask

    sizes = torch.tensor([*lengths, blocks * FLEX_BLOCK - sum(lengths)])
    first_T = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes).int()  # first key that a query sees
    if window:
        first_T = torch.maximum(first_T, torch.arange(1 - window, len(first_T) + 1 - window).int())
    number = torch.arange(blocks)
    begin = number * FLEX_BLOCK
    is_seen = (number <= number[:, None]) & (begin + FLEX_BLOCK > first_T[begin][:, None])
    is_full = (number < number[:, None]) & (begin >= first_T[begin + FLEX_BLOCK - 1][:, None])
    first_T = to_device(first_T, device)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (key >= first_T[query])

    partial, full = (_listed(blocks_QK, device) for blocks_QK in (is_seen & ~is_full, is_full))
    return BlockMask.from_kv_blocks(*partial, *full, FLEX_BLOCK, sees)


def _listed(blocks_QK: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of key blocks of each query block, and their indices, in FlexAttention's shapes."""
    numbers = blocks_QK.int().argsort(dim=1, descending=True, stable=True)
    return to_device(blocks_QK.sum(1).int()[None, None], device), to_device(numbers.int()[None, None], device)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, kind: Attention) -> torch.Tensor:
    """Compute softmax attention in float32, document by document."""
    outs, token, key = [], 0, 0
    repeat = kind.heads.query // kind.heads.key
    key_lengths = documents.lengths if documents.keys is None else documents.keys.lengths
    for length, count in zip(documents.lengths, key_lengths, strict=True):
        qs = q[token : token + length].float().transpose(0, 1)
        ks, vs = (x[key : key + count].float().transpose(0, 1).repeat_interleave(repeat, 0) for x in (k, v))
        scores = qs @ ks.mT * kind.scale
        if kind.softcap:
            scores = kind.softcap * torch.tanh(scores / kind.softcap)
        place = torch.arange(count, device=q.device)
        back = place[count - length :, None] - place[None]
        seen = (back >= 0) & (back < (kind.window or count))
        outs.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ vs).transpose(0, 1))
        token, key = token + length, key + count
    return torch.cat(outs).to(q.dtype)
