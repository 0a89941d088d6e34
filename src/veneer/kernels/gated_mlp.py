"""Computes the gate of the MLP: h = act(gate) * up, forward and backward, for SwiGLU and GeGLU (arXiv 2002.05202).

Gate and up are adjacent columns, as their joint product writes them. Backward overwrites them with their gradients and
the gradient of h with h itself, which the adapter's gradient needs: nothing is allocated. Where columns are scaled
(`column_scale`), gate and up are stored unscaled, and so are their gradients.

Shapes: T tokens, F width of the MLP.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from veneer.kernels.column_scale import ColumnScale, scaled
from veneer.kernels.launch import launch, power_of_2, runs_triton, tl, triton
from veneer.kernels.update import OFF_GRID

SILU, GELU_TANH, GELU = 0, 1, 2
ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH, "gelu": GELU}
BLOCK = 1024
TILE = (32, 64, 2)  # tokens, columns and warps of a program that computes adapters' gradients too
SCALED_WARPS = 4  # of such a program where columns are scaled too, which takes more registers
MAX_PARTS = 4


def gated_mlp(gate_up_TF: torch.Tensor, h_TF: torch.Tensor, activation: int, scale: ColumnScale | None = None) -> None:
    """Compute h = act(gate) * up.

    Args:
        gate_up_TF: gate, then up, shape (T, 2F or more), with any row stride.
        h_TF: output, with any row stride.
        activation: one of ACTIVATIONS.
        scale: scale of the columns of gate and up.
    """
    T, width = h_TF.shape
    if not runs_triton(h_TF):
        gate, up = scaled(gate_up_TF[:, : 2 * width], scale).split(width, dim=1)
        h_TF.copy_(_act_torch(gate, activation)[0] * up)
        return
    launch(_forward, (T, triton.cdiv(width, BLOCK)))(
        gate_up_TF, h_TF, *(scale or (h_TF, h_TF)), width, gate_up_TF.stride(0), h_TF.stride(0),
        ACTIVATION=activation, HAS_SCALE=scale is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def gated_mlp_backward(gate_up_TF: torch.Tensor, dh_TF: torch.Tensor, activation: int) -> None:
    """Overwrite gate and up with their gradients, and the gradient of h with h."""
    T, width = dh_TF.shape
    if not runs_triton(dh_TF):
        gate, up = gate_up_TF[:, :width].float(), gate_up_TF[:, width : 2 * width].float()
        value, slope = _act_torch(gate, activation)
        h, dgate, dup = value * up, dh_TF.float() * up * slope, dh_TF.float() * value
        gate_up_TF[:, :width], gate_up_TF[:, width : 2 * width] = dgate, dup
        dh_TF.copy_(h)
        return
    launch(_backward, (T, triton.cdiv(width, BLOCK)), (gate_up_TF, dh_TF))(
        gate_up_TF, dh_TF, width, gate_up_TF.stride(0), dh_TF.stride(0), ACTIVATION=activation, BLOCK=BLOCK, num_warps=4
    )


class AdapterGradientParts(NamedTuple):
    """Partial sums of adapters' gradients over parts of the tokens; float32. P parts, r rank, R stacked ranks.

    Attributes:
        a_PrF: partial sums of down's A gradient.
        b_PRF: partial sums of gate's and up's B gradients, (P, R, 2F); each column holds its own slot's rows alone, the
            others are not set.
        sums_PF: partial sums over tokens of the gradients of gate and up times their stored values, (P, 2F); empty:
            their columns are not scaled.
    """

    a_PrF: torch.Tensor
    b_PRF: torch.Tensor
    sums_PF: torch.Tensor

    @staticmethod
    def empty(
        tokens: int, width: int, rank: int, stacked: int, like: torch.Tensor, is_scaled: bool = False
    ) -> "AdapterGradientParts":
        """Allocate for pieces of up to so many tokens; with a rank of 0, for the sums alone."""
        count = max(1, min(MAX_PARTS, tokens // 512)) if runs_triton(like) else 1
        shapes = (count, rank, width), (count, stacked, 2 * width), (count, 2 * width if is_scaled else 0)
        return AdapterGradientParts(*(torch.empty(shape, dtype=torch.float32, device=like.device) for shape in shapes))


def gated_mlp_backward_adapters(
    gate_up_TF: torch.Tensor,
    dh_TF: torch.Tensor,
    activation: int,
    u_TR: torch.Tensor,
    v_Tr: torch.Tensor,
    slots: tuple[int, int],
    parts: AdapterGradientParts,
    is_first: bool,
    scale: ColumnScale | None = None,
) -> None:
    """Compute `gated_mlp_backward` and the adapters' gradients in one pass, which saves three reads.

    Without adapters (where `parts` has a rank of 0) it computes the sums of a scale's gradient alone.

    Args:
        gate_up_TF: gate and up; overwritten with their gradient.
        dh_TF: gradient of h; it may be overwritten.
        u_TR: low-rank activations x A^T of the adapters of gate and up.
        v_Tr: low-rank gradient dy B of down's adapter.
        slots: index of the block of u that belongs to gate, and of up's.
        parts: partial sums, filled or added to.
        is_first: whether the sums are filled.
        scale: scale of the columns of gate and up; the gradients are those of what it scales.
    """
    T, width = dh_TF.shape
    rank = parts.a_PrF.shape[1]
    if not runs_triton(dh_TF):
        if is_first:
            for part in parts:
                part.zero_()
        z_TF = gate_up_TF[:, : 2 * width].to(torch.float32, copy=True)
        if scale is not None:
            gate_up_TF[:, : 2 * width] = scaled(z_TF, scale)
        gated_mlp_backward(gate_up_TF, dh_TF, activation)
        if scale is not None:
            parts.sums_PF[0] += (gate_up_TF[:, : 2 * width].float() * z_TF).sum(0)
            gate_up_TF[:, : 2 * width] *= scale.factor_N * OFF_GRID
        if not rank:
            return
        parts.a_PrF[0] += v_Tr.float().T @ dh_TF.float()
        for slot, columns in zip(slots, (slice(0, width), slice(width, 2 * width)), strict=True):
            own = slice(slot * rank, (slot + 1) * rank)
            parts.b_PRF[0, own, columns] += u_TR[:, own].float().T @ gate_up_TF[:, columns].float()
        return
    count, stacked, _ = parts.b_PRF.shape
    tokens, block_f, warps = TILE if scale is None else (*TILE[:2], SCALED_WARPS)
    span = triton.cdiv(triton.cdiv(T, count), tokens) * tokens
    again = (gate_up_TF,) if is_first else (gate_up_TF, *parts)
    launch(_backward_adapters, (triton.cdiv(width, block_f), count), again)(
        gate_up_TF, dh_TF, u_TR, v_Tr, *parts, *(scale or (dh_TF, dh_TF)), OFF_GRID,
        T, width, stacked, rank, slots[0], slots[1], span,
        gate_up_TF.stride(0), dh_TF.stride(0), u_TR.stride(0), v_Tr.stride(0),
        ACTIVATION=activation, IS_FIRST=is_first, HAS_RANKS=rank > 0, HAS_SCALE=scale is not None,
        BLOCK_T=tokens, BLOCK_F=block_f, BLOCK_R=power_of_2(max(1, rank)),
        PRECISION="ieee" if dh_TF.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=2,
    )  # fmt: skip


def _act_torch(gate: torch.Tensor, activation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return value and derivative of the activation."""
    if activation == SILU:
        s = torch.sigmoid(gate)
        return gate * s, s * (1 + gate * (1 - s))
    if activation == GELU_TANH:
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        th = torch.tanh(inner)
        slope = 0.5 * (1 + th) + 0.5 * gate * (1 - th * th) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate**2)
        return F.gelu(gate, approximate="tanh"), slope
    cdf = 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return gate * cdf, cdf + gate * torch.exp(-0.5 * gate**2) / math.sqrt(2 * math.pi)


@triton.jit
def _act(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        s = tl.sigmoid(gate)
        value = gate * s
        slope = s * (1.0 + gate * (1.0 - s))
    elif ACTIVATION == 1:
        root = 0.7978845608028654
        inner = root * (gate + 0.044715 * gate * gate * gate)
        th = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
        value = 0.5 * gate * (1.0 + th)
        slope = 0.5 * (1.0 + th) + 0.5 * gate * (1.0 - th * th) * root * (1.0 + 0.134145 * gate * gate)
    else:
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = gate * cdf
        slope = cdf + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    return value, slope


@triton.jit
def _scaled(value, factor, shift, at, inside):
    return value * tl.load(factor + at, mask=inside, other=0.0) + tl.load(shift + at, mask=inside, other=0.0)


@triton.jit
def _forward(
    gate_up, h, factor, shift, width, stride, h_stride,
    ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < width
    gate = tl.load(gate_up + t * stride + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + t * stride + width + f, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        gate, up = _scaled(gate, factor, shift, f, inside), _scaled(up, factor, shift, width + f, inside)
    value, _ = _act(gate, ACTIVATION)
    tl.store(h + t * h_stride + f, (value * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate_up, dh, width, stride, h_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < width
    at = gate_up + t * stride + f
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dh + t * h_stride + f, mask=inside, other=0.0).to(tl.float32)
    value, slope = _act(gate, ACTIVATION)
    tl.store(at, (grad * up * slope).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(at + width, (grad * value).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(dh + t * h_stride + f, (value * up).to(dh.dtype.element_ty), mask=inside)


@triton.jit
def _backward_adapters(
    gate_up, dh, u, v, parts_a, parts_b, parts_sum, factor, shift, off_grid,
    T, width, R, rank, gate_slot, up_slot, span, stride, h_stride, u_stride, v_stride,
    ACTIVATION: tl.constexpr, IS_FIRST: tl.constexpr, HAS_RANKS: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    part = tl.program_id(1)
    r = tl.arange(0, BLOCK_R)
    total_a = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    total_gate = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    total_up = tl.zeros((BLOCK_R, BLOCK_F), dtype=tl.float32)
    is_f = f < width
    if HAS_SCALE:
        sum_gate = tl.zeros((BLOCK_F,), dtype=tl.float32)
        sum_up = tl.zeros((BLOCK_F,), dtype=tl.float32)
        by_gate = tl.load(factor + f, mask=is_f, other=0.0)[None, :]
        by_up = tl.load(factor + width + f, mask=is_f, other=0.0)[None, :]
        shift_gate = tl.load(shift + f, mask=is_f, other=0.0)[None, :]
        shift_up = tl.load(shift + width + f, mask=is_f, other=0.0)[None, :]
    first = part * span
    last = tl.minimum(first + span, T)
    for start in range(first, last, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (t < last)[:, None] & is_f[None, :]
        at = gate_up + t[:, None] * stride + f[None, :]
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dh + t[:, None] * h_stride + f[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_RANKS:
            is_r = (r < rank)[:, None] & (t < last)[None, :]
            row = u + t[None, :] * u_stride + r[:, None]
            of_down = tl.load(v + t[None, :] * v_stride + r[:, None], mask=is_r, other=0.0)
            of_gate = tl.load(row + gate_slot * rank, mask=is_r, other=0.0)
            of_up = tl.load(row + up_slot * rank, mask=is_r, other=0.0)
        dtype = gate_up.dtype.element_ty
        if HAS_SCALE:
            z_gate, z_up = gate, up
            gate, up = gate * by_gate + shift_gate, up * by_up + shift_up
        value, slope = _act(gate, ACTIVATION)
        if HAS_SCALE:
            wide_gate, wide_up = grad * up * slope, grad * value
            sum_gate += tl.sum(wide_gate * z_gate, axis=0)
            sum_up += tl.sum(wide_up * z_up, axis=0)
            d_gate = (wide_gate * (by_gate * off_grid)).to(dtype)
            d_up = (wide_up * (by_up * off_grid)).to(dtype)
            h = (value * up).to(dtype)
        else:
            d_gate, d_up, h = (grad * up * slope).to(dtype), (grad * value).to(dtype), (value * up).to(dtype)
        tl.store(at, d_gate, mask=inside)
        tl.store(at + width, d_up, mask=inside)
        if HAS_RANKS:
            total_a = tl.dot(of_down, h, total_a, input_precision=PRECISION)
            total_gate = tl.dot(of_gate, d_gate, total_gate, input_precision=PRECISION)
            total_up = tl.dot(of_up, d_up, total_up, input_precision=PRECISION)
        else:
            tl.store(dh + t[:, None] * h_stride + f[None, :], h, mask=inside)
    if HAS_SCALE:
        sums = parts_sum + part.to(tl.int64) * (2 * width) + f
        if not IS_FIRST:
            sum_gate += tl.load(sums, mask=is_f, other=0.0)
            sum_up += tl.load(sums + width, mask=is_f, other=0.0)
        tl.store(sums, sum_gate, mask=is_f)
        tl.store(sums + width, sum_up, mask=is_f)
    if HAS_RANKS:
        _store_parts(
            parts_a, parts_b, total_a, total_gate, total_up, part, f, r, width, R, rank, gate_slot, up_slot, IS_FIRST
        )


@triton.jit
def _store_parts(
    parts_a, parts_b, total_a, total_gate, total_up, part, f, r, width, R, rank, gate_slot, up_slot,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    keep = (r < rank)[:, None] & (f < width)[None, :]
    ptr_a = parts_a + (part * rank + r)[:, None].to(tl.int64) * width + f[None, :]
    ptr = parts_b + (part * R + r)[:, None].to(tl.int64) * (2 * width) + f[None, :]
    ptr_gate, ptr_up = ptr + gate_slot * rank * 2 * width, ptr + up_slot * rank * 2 * width + width
    if not IS_FIRST:
        total_a += tl.load(ptr_a, mask=keep, other=0.0)
        total_gate += tl.load(ptr_gate, mask=keep, other=0.0)
        total_up += tl.load(ptr_up, mask=keep, other=0.0)
    tl.store(ptr_a, total_a, mask=keep)
    tl.store(ptr_gate, total_gate, mask=keep)
    tl.store(ptr_up, total_up, mask=keep)
