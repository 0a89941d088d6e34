"""Applies rotary positions (arXiv 2104.09864) to the output of the q, k, v product, after Qwen3's norm of heads.

The three are columns of one tensor; the kernel rotates its q and k part in place, so nothing is copied. Backward
gathers the gradients of q, k and v into one such tensor, which the next product reads. A model may rotate only the
first dimensions of a head (Phi). Positions begin at 0 in every document.

Shapes: T tokens, N = (H + 2K) C, H query heads, K key heads, C dimensions of a head, P positions, S half of the
dimensions that are rotated.
"""

from typing import Any, NamedTuple

import torch

from veneer.kernels.column_scale import ColumnScale, scaled
from veneer.kernels.launch import launch, power_of_2, runs_triton, tl, triton


class Heads(NamedTuple):
    """The numbers of query and key heads, and their size."""

    query: int
    key: int
    size: int


class HeadNorm(NamedTuple):
    """The weights of RMSNorm on each head of q and of k."""

    query_C: torch.Tensor
    key_C: torch.Tensor
    eps: float


def rope(
    qkv_TN: torch.Tensor,
    heads: Heads,
    position_T: torch.Tensor,
    cos_PS: torch.Tensor,
    sin_PS: torch.Tensor,
    norm: HeadNorm | None = None,
    scale: ColumnScale | None = None,
) -> torch.Tensor:
    """Rotate q and k: in place, or in a new tensor where backward needs the old one, for `norm` or `scale`.

    Args:
        qkv_TN: output of the q, k, v product, with any row stride.
        position_T: position of each token in its document, int32.
        cos_PS, sin_PS: tables by position, float32.
        norm: norm of each head of q and k.
        scale: scale of the columns, before the norm.
    """
    T, N = qkv_TN.shape
    in_place = norm is None and scale is None
    out_TN = qkv_TN if in_place else qkv_TN.new_empty((T, N))
    if not runs_triton(qkv_TN):
        q, k, v = split_heads(qkv_TN if scale is None else scaled(qkv_TN, scale), heads)
        if norm is not None:
            q, k = _norm(q, norm.query_C, norm.eps), _norm(k, norm.key_C, norm.eps)
        cos, sin = cos_PS[position_T.long()][:, None], sin_PS[position_T.long()][:, None]
        for part, out in zip((q, k), split_heads(out_TN, heads)):
            out.copy_(_rotate(part.float(), cos, sin))
        split_heads(out_TN, heads)[2].copy_(v)
        return out_TN
    S = cos_PS.shape[1]
    launch(_forward, (T, triton.cdiv(heads.query + 2 * heads.key, 8)), (out_TN,) if in_place else ())(
        qkv_TN, out_TN, position_T, cos_PS, sin_PS, *(scale or (qkv_TN, qkv_TN)),
        *((norm.query_C, norm.key_C, norm.eps) if norm else (qkv_TN, qkv_TN, 0.0)),
        qkv_TN.stride(0), out_TN.stride(0), H=heads.query, K=heads.key, C=heads.size, S=S, HAS_NORM=norm is not None,
        HAS_SCALE=scale is not None, BLOCK_S=power_of_2(S), BLOCK_C=power_of_2(heads.size), num_warps=2,
    )  # fmt: skip
    return out_TN


def rope_backward(
    dq_THC: torch.Tensor,
    dk_TKC: torch.Tensor,
    dv_TKC: torch.Tensor,
    heads: Heads,
    position_T: torch.Tensor,
    cos_PS: torch.Tensor,
    sin_PS: torch.Tensor,
    out_TN: torch.Tensor,
    raw_TN: torch.Tensor | None = None,
    norm: HeadNorm | None = None,
    scale: ColumnScale | None = None,
) -> None:
    """Compute the gradient of the (scaled) output of the q, k, v product into `out_TN`, of any row stride.

    Args:
        dq_THC, dk_TKC, dv_TKC: gradients of the rotated q and k and of v, in any layout.
        raw_TN: output of the product before norm and rotation; needed with `norm`.
        norm, scale: those of the forward.
    """
    T = len(dq_THC)
    if not runs_triton(out_TN):
        cos, sin = cos_PS[position_T.long()][:, None], sin_PS[position_T.long()][:, None]
        outs = split_heads(out_TN, heads)
        raws = split_heads(scaled(raw_TN, scale), heads) if norm and raw_TN is not None else (None,) * 3
        weights = (norm.query_C, norm.key_C) if norm else (None,) * 2
        for grad, out, raw, weight in zip((dq_THC, dk_TKC), outs, raws, weights):
            turned = _rotate(grad.float(), cos, -sin)
            if norm is not None and raw is not None and weight is not None:
                turned = _norm_backward(turned, raw, weight, norm.eps)
            out.copy_(turned)
        outs[2].copy_(dv_TKC)
        return
    S = cos_PS.shape[1]
    # The last dimension is dense in every layout that attention returns.
    dq_THC, dk_TKC, dv_TKC = (g if g.stride(2) == 1 else g.contiguous() for g in (dq_THC, dk_TKC, dv_TKC))
    launch(_backward, (T, triton.cdiv(heads.query + 2 * heads.key, 8)))(
        dq_THC, dk_TKC, dv_TKC, out_TN, out_TN if raw_TN is None else raw_TN, position_T, cos_PS, sin_PS,
        *(scale or (out_TN, out_TN)),
        *((norm.query_C, norm.key_C, norm.eps) if norm else (out_TN, out_TN, 0.0)),
        dq_THC.stride(0), dq_THC.stride(1), dk_TKC.stride(0), dk_TKC.stride(1), dv_TKC.stride(0), dv_TKC.stride(1),
        out_TN.stride(0), 0 if raw_TN is None else raw_TN.stride(0),
        H=heads.query, K=heads.key, C=heads.size, S=S, HAS_NORM=norm is not None, HAS_SCALE=scale is not None,
        BLOCK_S=power_of_2(S), BLOCK_C=power_of_2(heads.size), num_warps=2,
    )  # fmt: skip


def split_heads(qkv_TN: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, ...]:
    """Return views (T, heads, C) of q, k and v."""
    sizes = [heads.query * heads.size, heads.key * heads.size, heads.key * heads.size]
    return tuple(part.unflatten(1, (-1, heads.size)) for part in qkv_TN.split(sizes, dim=1))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _norm(x: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight_C.float()


def _norm_backward(dy: torch.Tensor, x: Any, weight_C: Any, eps: float) -> torch.Tensor:
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    unit, g = wide * rstd, dy * weight_C.float()
    dx: torch.Tensor = rstd * (g - unit * (g * unit).mean(-1, keepdim=True))
    return dx


@triton.jit
def _value(row, factor, shift, head, at, inside, HAS_SCALE: tl.constexpr):
    """Load values of heads, and scale them."""
    value = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        value = value * tl.load(factor + head + at, mask=inside, other=0.0)
        value += tl.load(shift + head + at, mask=inside, other=0.0)
    return value


@triton.jit
def _weight(q_weight, k_weight, is_q, at, inside):
    """Weights of the norm of q's heads, or of k's."""
    of_q = tl.load(q_weight + at, mask=inside, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_q, of_q, of_k)


@triton.jit
def _forward(
    qkv, out, position, cos, sin, factor, shift, q_weight, k_weight, eps, stride, out_stride,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, S: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * 8 + tl.arange(0, 8)[:, None]
    s, c = tl.arange(0, BLOCK_S)[None, :], tl.arange(0, BLOCK_C)[None, :]
    turns = (h < H + K) & (s < S)
    pos = tl.load(position + t)
    co = tl.load(cos + pos * S + s, mask=s < S, other=0.0)
    si = tl.load(sin + pos * S + s, mask=s < S, other=0.0)
    at, out_at = t * stride + h * C, t * out_stride + h * C
    first = _value(qkv + at, factor, shift, h * C, s, turns, HAS_SCALE)
    second = _value(qkv + at, factor, shift, h * C, S + s, turns, HAS_SCALE)
    if HAS_NORM or HAS_SCALE:
        whole = _value(qkv + at, factor, shift, h * C, c, (h < H + 2 * K) & (c < C), HAS_SCALE)
        turned = whole
    if HAS_NORM:
        rstd = tl.rsqrt(tl.sum(whole * whole, axis=1) / C + eps)[:, None]
        is_q = h < H
        w1 = _weight(q_weight, k_weight, is_q, s, s < S)
        w2 = _weight(q_weight, k_weight, is_q, S + s, s < S)
        w = _weight(q_weight, k_weight, is_q, c, c < C)
        first, second, turned = first * rstd * w1, second * rstd * w2, whole * rstd * w
    if HAS_NORM or HAS_SCALE:
        # Copy what is not rotated: v, and the rest of a head of which only the first part is.
        stays = (h < H + 2 * K) & (c < C) & ((h >= H + K) | (c >= 2 * S))
        tl.store(out + out_at + c, tl.where(h < H + K, turned, whole).to(out.dtype.element_ty), mask=stays)
    tl.store(out + out_at + s, (first * co - second * si).to(out.dtype.element_ty), mask=turns)
    tl.store(out + out_at + S + s, (second * co + first * si).to(out.dtype.element_ty), mask=turns)


@triton.jit
def _backward(
    dq, dk, dv, out, raw, position, cos, sin, factor, shift, q_weight, k_weight, eps,
    q_t, q_h, k_t, k_h, v_t, v_h, stride, raw_stride,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, S: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * 8 + tl.arange(0, 8)[:, None]
    s, c = tl.arange(0, BLOCK_S)[None, :], tl.arange(0, BLOCK_C)[None, :]
    is_q, is_k, is_v = h < H, (h >= H) & (h < H + K), (h >= H + K) & (h < H + 2 * K)
    q_at, k_at, v_at = t * q_t + h * q_h, t * k_t + (h - H) * k_h, t * v_t + (h - H - K) * v_h
    at = t * stride + h * C
    pos = tl.load(position + t)
    co = tl.load(cos + pos * S + s, mask=s < S, other=0.0)
    si = tl.load(sin + pos * S + s, mask=s < S, other=0.0)
    half = s < S
    g1 = tl.load(dq + q_at + s, mask=is_q & half, other=0.0).to(tl.float32) + tl.load(
        dk + k_at + s, mask=is_k & half, other=0.0
    ).to(tl.float32)
    g2 = tl.load(dq + q_at + S + s, mask=is_q & half, other=0.0).to(tl.float32) + tl.load(
        dk + k_at + S + s, mask=is_k & half, other=0.0
    ).to(tl.float32)
    d1, d2 = g1 * co + g2 * si, g2 * co - g1 * si
    rest = (c >= 2 * S) & (c < C)
    d3 = tl.load(dq + q_at + c, mask=is_q & rest, other=0.0).to(tl.float32) + tl.load(
        dk + k_at + c, mask=is_k & rest, other=0.0
    ).to(tl.float32)
    if HAS_NORM:
        r_at = t * raw_stride + h * C
        turned = is_q | is_k
        x1 = _value(raw + r_at, factor, shift, h * C, s, turned & half, HAS_SCALE)
        x2 = _value(raw + r_at, factor, shift, h * C, S + s, turned & half, HAS_SCALE)
        x3 = _value(raw + r_at, factor, shift, h * C, c, turned & rest, HAS_SCALE)
        w1 = _weight(q_weight, k_weight, is_q, s, half)
        w2 = _weight(q_weight, k_weight, is_q, S + s, half)
        w3 = _weight(q_weight, k_weight, is_q, c, c < C)
        rstd = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1) + tl.sum(x3 * x3, axis=1)) / C + eps)[
            :, None
        ]
        d1, d2, d3 = d1 * w1, d2 * w2, d3 * w3
        u1, u2, u3 = x1 * rstd, x2 * rstd, x3 * rstd
        mean = ((tl.sum(d1 * u1, axis=1) + tl.sum(d2 * u2, axis=1) + tl.sum(d3 * u3, axis=1)) / C)[:, None]
        d1, d2, d3 = rstd * (d1 - u1 * mean), rstd * (d2 - u2 * mean), rstd * (d3 - u3 * mean)
    tl.store(out + at + s, d1.to(out.dtype.element_ty), mask=(is_q | is_k) & half)
    tl.store(out + at + S + s, d2.to(out.dtype.element_ty), mask=(is_q | is_k) & half)
    if 2 * S < C:
        tl.store(out + at + c, d3.to(out.dtype.element_ty), mask=(is_q | is_k) & rest)
    value = tl.load(dv + v_at + c, mask=is_v & (c < C), other=0.0)
    tl.store(out + at + c, value.to(out.dtype.element_ty), mask=is_v & (c < C))
