"""The gate of the MLP: h = act(gate) * up, forward and backward, for SwiGLU and GeGLU (arXiv 2002.05202).

Gate and up lie side by side, as their joint product writes them. Backward overwrites them with their gradients and
the gradient of h with h itself, which the adapter's gradient needs: nothing new is allocated.

Shapes: T tokens, F width of the MLP.
"""

import math

import torch
import torch.nn.functional as F

from veneer.kernels.launch import runs_triton, tl, triton

SILU, GELU_TANH, GELU = 0, 1, 2
ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH, "gelu": GELU}
BLOCK = 1024


def gated_mlp(gate_up_TF: torch.Tensor, h_TF: torch.Tensor, activation: int) -> None:
    """h = act(gate) * up.

    Args:
        gate_up_TF: Gate, then up, shape (T, 2F or more); rows may lie apart.
        h_TF: Filled; rows may lie apart.
        activation: One of ACTIVATIONS.
    """
    T, width = h_TF.shape
    if not runs_triton(h_TF):
        gate, up = gate_up_TF[:, :width].float(), gate_up_TF[:, width : 2 * width].float()
        h_TF.copy_(_act_torch(gate, activation)[0] * up)
        return
    _forward[(T, triton.cdiv(width, BLOCK))](
        gate_up_TF, h_TF, width, gate_up_TF.stride(0), h_TF.stride(0), ACTIVATION=activation, BLOCK=BLOCK, num_warps=4
    )


def gated_mlp_backward(gate_up_TF: torch.Tensor, dh_TF: torch.Tensor, activation: int) -> None:
    """Overwrites gate and up with their gradients, and the gradient of h with h."""
    T, width = dh_TF.shape
    if not runs_triton(dh_TF):
        gate, up = gate_up_TF[:, :width].float(), gate_up_TF[:, width : 2 * width].float()
        value, slope = _act_torch(gate, activation)
        h, dgate, dup = value * up, dh_TF.float() * up * slope, dh_TF.float() * value
        gate_up_TF[:, :width], gate_up_TF[:, width : 2 * width] = dgate, dup
        dh_TF.copy_(h)
        return
    _backward[(T, triton.cdiv(width, BLOCK))](
        gate_up_TF, dh_TF, width, gate_up_TF.stride(0), dh_TF.stride(0), ACTIVATION=activation, BLOCK=BLOCK, num_warps=4
    )


def _act_torch(gate: torch.Tensor, activation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and slope of the activation."""
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
def _forward(gate_up, h, width, stride, h_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < width
    gate = tl.load(gate_up + t * stride + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + t * stride + width + f, mask=inside, other=0.0).to(tl.float32)
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
