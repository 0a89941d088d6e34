"""Computes attention by FlashAttention-4, the optional package flash-attn-4, on Hopper and later.

It takes documents of any length, windows and capped scores, adds in a fixed order on request for a few percent, and
takes a tenth of cuDNN's workspace for long rows. Its kernels are compiled when a shape of head is first used, in some
ten seconds. Its forward and backward are called directly, as its own autograd function calls them.

Tensors on the meta device are allocated as the package allocates its own.

Shapes: T tokens, S keys (T of them, but where documents share some), H query heads, K key heads, C dimensions of a
head, B documents.
"""

from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from veneer.config.notify import notify
from veneer.engine.trace import Trace, faster_than_flash

BLOCK = 128  # tokens to which it rounds
LARGEST_HEAD = {9: 256, 10: 128, 11: 128}  # by major capability; on others its backward has no fixed order


class Bounds(NamedTuple):
    """The bounds of documents on the device, int32, of their queries and of their keys, and the tokens of the longest.

    Where a document has more keys than queries, its last query is at its last key.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest: int

    def arguments(self) -> dict[str, Any]:
        """Return them by the package's names."""
        lengths = {"max_seqlen_q": self.longest, "max_seqlen_k": self.longest}
        return {"cu_seqlens_q": self.queries, "cu_seqlens_k": self.keys} | lengths


class Scores(NamedTuple):
    """The arguments that turn scores into probabilities: factor, window (0: none) and soft cap (0: none)."""

    scale: float
    window: int
    softcap: float

    def arguments(self) -> dict[str, Any]:
        """Return them by the package's names."""
        window = {"window_size_left": self.window - 1, "window_size_right": 0} if self.window else {}
        return {"softmax_scale": self.scale, "causal": True, "softcap": self.softcap} | window


def is_installed() -> bool:
    """Return whether the package can be imported."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


def takes(head_size: int, capability: int) -> bool:
    """Return whether it computes heads of this size on GPUs of this major capability."""
    return head_size % 8 == 0 and head_size <= LARGEST_HEAD.get(capability, 0) and is_installed()


@cache
def _interface() -> Any:
    from flash_attn.cute import interface

    return interface


@cache
def is_able(heads: int, keys: int, size: int, window: int, softcap: float) -> bool:
    """Return whether it works here, by a small pass, which compiles its kernels."""
    device = torch.device("cuda", torch.cuda.current_device())
    q, k, v = (torch.zeros((256, n, size), dtype=torch.bfloat16, device=device) for n in (heads, keys, keys))
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32, device=device)
    bounds = Bounds(offsets, offsets, 256)
    scores = Scores(size**-0.5, window, softcap)
    try:
        out, lse = attend(q, k, v, bounds, scores)
        attend_backward(out, (q, k, v), out, lse, bounds, scores)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  # a compiler of its own, whose errors have many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        notify(f"FlashAttention-4 is installed and does not work here ({reason}): attention is slower without it")
        return False
    return True


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Bounds, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (T, H, C) and its log-sum-exp (H, T), float32, of q (T, H, C), k and v (S, K, C)."""
    T, H, C = q.shape
    out, lse = q.new_empty((T, H, C)), q.new_empty((H, T), dtype=torch.float32)
    if q.is_meta:
        _note(2.0, q, k, bounds, scores)
        return out, lse
    _interface()._flash_attn_fwd(q, k, v, return_lse=True, out=out, lse=lse, **bounds.arguments(), **scores.arguments())
    return out, lse


def attend_backward(
    dout: torch.Tensor,
    qkv: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    lse: torch.Tensor,
    bounds: Bounds,
    scores: Scores,
) -> tuple[torch.Tensor, ...]:
    """Return gradients of q (T, H, C), k and v (S, K, C)."""
    if dout.is_meta:
        return _meta_backward(qkv, bounds, scores)
    grads = _interface()._flash_attn_bwd(
        *qkv, out, dout, lse, deterministic=True, **bounds.arguments(), **scores.arguments()
    )
    return tuple(grads[:3])


def _meta_backward(qkv: tuple[torch.Tensor, ...], bounds: Bounds, scores: Scores) -> tuple[torch.Tensor, ...]:
    """Allocate what backward allocates: gradients, their float32 sums, and counters that keep the order."""
    q, k, _ = qkv
    (T, H, C), (S, K, _), B = q.shape, k.shape, len(bounds.queries)
    tokens, keys = (-(-(count + B * BLOCK) // BLOCK) * BLOCK for count in (T, S))
    single = partial(q.new_empty, dtype=torch.float32)
    grads = tuple(x.new_empty(x.shape) for x in qkv)
    sums = [single((H, tokens * C)), single((2, H, tokens))]
    if H != K:
        sums += [single((K, keys * C)) for _ in range(2)]
    counts = (B - 1) * (H * -(-bounds.longest // 64) + 2 * 2 * K * -(-bounds.longest // BLOCK))
    sums.append(single((counts,)))
    _note(5.0, q, k, bounds, scores)
    return grads


def _note(factor: float, q: torch.Tensor, k: torch.Tensor, bounds: Bounds, scores: Scores) -> None:
    """Count the work: two products forward and five backward, half of them masked."""
    seen = min(bounds.longest, scores.window or bounds.longest)
    if Trace.is_active():
        flops = factor * q.numel() * seen / faster_than_flash(seen)
        Trace.current().note("attention", flops, factor * (q.nbytes + k.nbytes))
