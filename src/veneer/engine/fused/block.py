"""One decoder block, forward and backward, written by hand as one unit.

What a step must hold between the two is a list of named tensors, and for each the plan says keep or recompute:

    x          residual stream before the block                         always kept (the checkpoint)
    qkv        rotated q, k, v          <- norm, product, rotation      "qkv"
    out        attention's output       <- attention                    "attention" (with its log-sum-exp)
    mid        residual stream between  <- o_proj, sum                  "mid"
    gate_up    gate and up              <- norm, product                "gate_up"
    h          act(gate) * up           <- element-wise                 made anew by backward in any case

down_proj is never recomputed: nothing in backward needs its output. Adapters' columns (x A^T, T x r) are so small that
they are kept. Recomputing runs the same code on the same inputs, so that a kept and a recomputed step are equal bit for
bit. Frozen weights get no gradient.

Shapes: T tokens, D model width, F width of the MLP, N outputs of q, k, v.
"""

from dataclasses import dataclass
from typing import Any

import torch

from veneer.engine.fused.attention import Attention, Documents, attend, attend_backward
from veneer.engine.fused.family import Decoder, Layer, Norm
from veneer.engine.fused.group import Group
from veneer.kernels.gated_mlp import gated_mlp, gated_mlp_backward, gated_mlp_backward_adapters
from veneer.kernels.rms_norm import rms_norm, rms_norm_backward
from veneer.kernels.rope import rope, rope_backward

TENSORS = ("qkv", "attention", "mid", "gate_up")


@dataclass(frozen=True)
class Context:
    """What all blocks of a pass share.

    Attributes:
        documents: Of the packed batch.
        cos_PS, sin_PS: Rotary tables.
        scratch: Where 4-bit matrices are made 16-bit, one at a time.
        seed: Of dropout; None: none.
    """

    documents: Documents
    cos_PS: torch.Tensor
    sin_PS: torch.Tensor
    scratch: torch.Tensor
    seed: torch.Tensor | None


class Kept:
    """Tensors of one block between forward and backward; None: to be recomputed."""

    def __init__(self, x_TD: torch.Tensor) -> None:
        self.x: Any = x_TD
        self.rstd1: Any = None
        self.raw: Any = None  # before q's and k's norm
        self.qkv: Any = None
        self.xa_qkv: Any = None
        self.out: Any = None
        self.attention: Any = None  # log-sum-exp and the like
        self.xa_o: Any = None
        self.delta1: Any = None  # what a post-norm normalizes
        self.mid: Any = None
        self.rstd2: Any = None
        self.gate_up: Any = None
        self.xa_gate_up: Any = None
        self.xa_down: Any = None
        self.delta2: Any = None

    def drop(self, keep: frozenset[str]) -> None:
        """Let go of what the plan does not keep."""
        if "qkv" not in keep:
            self.raw = self.qkv = None
        if "attention" not in keep:
            self.out = self.attention = None
        if "mid" not in keep:
            self.mid = self.delta1 = None
        if "gate_up" not in keep:
            self.gate_up = None


class Block:
    """A decoder block over its groups of linears.

    Args:
        layer: The model's modules.
        decoder: Facts all blocks share.
        number: Which block.
        dtype: Of compute.
    """

    def __init__(self, layer: Layer, decoder: Decoder, number: int, dtype: torch.dtype) -> None:
        self.layer, self.decoder, self.number = layer, decoder, number
        key = number * 16
        self.qkv = Group(layer.qkv, dtype, key)
        self.o = Group((layer.o,), dtype, key + 4)
        self.gate_up = Group(layer.gate_up, dtype, key + 8)
        self.down = Group((layer.down,), dtype, key + 12)
        self.groups = (self.qkv, self.o, self.gate_up, self.down)
        self.attention = Attention(decoder.heads, decoder.scale, layer.window, decoder.softcap)

    def forward(self, x_TD: torch.Tensor, delta_TD: Any, post: Norm | None, at: Context, keep: frozenset[str]) -> Any:
        """The block on x + delta.

        Args:
            x_TD: The residual stream, without
            delta_TD: what the block before adds to it (None before the first), through
            post: that block's post-norm, if it has one.
            keep: Of TENSORS.

        Returns:
            (residual stream behind attention, what the MLP adds to it, what backward needs).
        """
        kept, y_TK = self._enter(x_TD, delta_TD, post)
        self._complete(kept, at, y_TK)
        h_TK = self.down.room(len(x_TD))
        gated_mlp(kept.gate_up, h_TK[:, : self.down.inputs], self.decoder.activation)
        delta2_TD = torch.empty_like(kept.x)
        kept.xa_down = self.down.forward(h_TK, self.down.matrix(at.scratch), delta2_TD, at.seed)
        if self.layer.post2 is not None:
            kept.delta2 = delta2_TD
        mid_TD = kept.mid
        kept.drop(keep)
        return mid_TD, delta2_TD, kept

    def _enter(self, x_TD: torch.Tensor, delta_TD: Any, post: Norm | None) -> tuple[Kept, torch.Tensor]:
        norm = self.layer.norm1
        y_TK = self.qkv.room(len(x_TD))
        sum_TD, rstd_T = rms_norm(
            x_TD, delta_TD, norm.weight_D, norm.eps, norm.offset, y_TK[:, : self.qkv.inputs], post and post.weight_D
        )
        kept = Kept(sum_TD)
        kept.rstd1 = rstd_T
        return kept, y_TK

    def _complete(self, kept: Kept, at: Context, y_TK: Any = None) -> None:
        """Make every tensor that backward needs and that is not there."""
        layer, T = self.layer, len(kept.x)
        if kept.qkv is None:
            if y_TK is None:
                norm = layer.norm1
                y_TK = self.qkv.room(T)
                rms_norm(kept.x, None, norm.weight_D, norm.eps, norm.offset, y_TK[:, : self.qkv.inputs])
            raw_TN = kept.x.new_empty((T, self.qkv.outputs))
            kept.xa_qkv = self.qkv.forward(y_TK, self.qkv.matrix(at.scratch), raw_TN, at.seed)
            kept.qkv = rope(raw_TN, self.decoder.heads, at.documents.position_T, at.cos_PS, at.sin_PS, layer.head_norm)
            kept.raw = raw_TN if layer.head_norm else None
        del y_TK
        if kept.out is None:
            kept.out, kept.attention = attend(kept.qkv, at.documents, self.attention)
        y2_TK = None
        if kept.mid is None:
            out_TK = self.o.room(T)
            out_TK[:, : self.o.inputs] = kept.out
            delta1_TD = torch.empty_like(kept.x)
            kept.xa_o = self.o.forward(out_TK, self.o.matrix(at.scratch), delta1_TD, at.seed)
            del out_TK
            y2_TK = self._norm2(kept, kept.x, delta1_TD)
            if layer.post1 is not None:
                kept.delta1 = delta1_TD
        if kept.gate_up is None:
            if y2_TK is None:
                y2_TK = self._norm2(kept, kept.mid, None)
            room_TK = kept.x.new_empty((T, self.gate_up.outputs + self.gate_up.margin))
            matrix = self.gate_up.matrix(at.scratch)
            kept.xa_gate_up = self.gate_up.forward(y2_TK, matrix, room_TK[:, : self.gate_up.outputs], at.seed)
            kept.gate_up = room_TK

    def _norm2(self, kept: Kept, x_TD: torch.Tensor, delta_TD: Any) -> torch.Tensor:
        norm, post = self.layer.norm2, self.layer.post1
        y_TK = self.gate_up.room(len(x_TD))
        kept.mid, kept.rstd2 = rms_norm(
            x_TD, delta_TD, norm.weight_D, norm.eps, norm.offset, y_TK[:, : self.gate_up.inputs],
            post.weight_D if post is not None and delta_TD is not None else None,
        )  # fmt: skip
        return y_TK

    def backward(self, d_TK: torch.Tensor, kept: Kept, at: Context, is_first: bool) -> None:
        """Adds the adapters' gradients to theirs, and turns the gradient behind the block into that before it.

        Args:
            d_TK: Gradient of the residual stream, shape (T, D + margin), in place; the margin is scratch.
            kept: Used up.
            is_first: Nothing before this block is trained, so that the gradient of its input is not needed.
        """
        layer, D, T = self.layer, kept.x.shape[1], len(kept.x)
        self._complete(kept, at)
        dy_TK = self._through_post(d_TK, kept.delta2, layer.post2, self.down)
        self.down.backward_margin(dy_TK)
        dh_TF = kept.x.new_empty((T, self.down.inputs))
        self.down.backward_input(dy_TK, self.down.matrix(at.scratch), dh_TF, at.seed)
        parts = self._gate_backward(kept, dy_TK, dh_TF)
        self.down.backward_adapters(dy_TK, dh_TF, kept.xa_down, at.seed, parts_a=parts and parts[0])
        del dh_TF, dy_TK
        self.gate_up.backward_margin(kept.gate_up)
        dx_TD = torch.empty_like(kept.x)
        self.gate_up.backward_input(kept.gate_up, self.gate_up.matrix(at.scratch), dx_TD, at.seed)
        norm = layer.norm2
        self.gate_up.backward_adapters(
            kept.gate_up, kept.mid, kept.xa_gate_up, at.seed, (kept.rstd2, norm.weight_D, norm.offset),
            parts_b=parts and parts[1],
        )  # fmt: skip
        del parts
        kept.gate_up = None
        rms_norm_backward(dx_TD, kept.mid, norm.weight_D, kept.rstd2, norm.eps, norm.offset, d_TK[:, :D])
        kept.mid = None
        dy_TK = self._through_post(d_TK, kept.delta1, layer.post1, self.o)
        self.o.backward_margin(dy_TK)
        dout_TO = torch.empty_like(kept.out)
        self.o.backward_input(dy_TK, self.o.matrix(at.scratch), dout_TO, at.seed)
        self.o.backward_adapters(dy_TK, kept.out, kept.xa_o, at.seed)
        del dy_TK
        grads = attend_backward(dout_TO, kept.qkv, kept.attention, at.documents, self.attention)
        del dout_TO
        kept.out = kept.attention = kept.qkv = None
        dqkv_TK = kept.x.new_empty((T, self.qkv.outputs + self.qkv.margin))
        dq_THC, dk_TKC, dv_TKC = grads
        rope_backward(
            dq_THC, dk_TKC, dv_TKC, self.decoder.heads, at.documents.position_T, at.cos_PS, at.sin_PS,
            dqkv_TK[:, : self.qkv.outputs], kept.raw, layer.head_norm,
        )  # fmt: skip
        del grads, dq_THC, dk_TKC, dv_TKC
        self.qkv.backward_margin(dqkv_TK)
        norm = layer.norm1
        self.qkv.backward_adapters(dqkv_TK, kept.x, kept.xa_qkv, at.seed, (kept.rstd1, norm.weight_D, norm.offset))
        if not is_first:
            self.qkv.backward_input(dqkv_TK, self.qkv.matrix(at.scratch), dx_TD, at.seed)
            rms_norm_backward(dx_TD, kept.x, norm.weight_D, kept.rstd1, norm.eps, norm.offset, d_TK[:, :D])

    def _gate_backward(self, kept: Kept, dy_TK: torch.Tensor, dh_TF: torch.Tensor) -> Any:
        """Gradient of gate and up in their place; where every linear of the MLP has its adapter, theirs on the way."""
        down, both = self.down, self.gate_up
        activation = self.decoder.activation
        slots = both.members[0].slot, both.members[-1].slot
        if not down.used or min(slots) < 0 or down.dropout_p or down.rank != both.rank:
            gated_mlp_backward(kept.gate_up, dh_TF, activation)
            return None
        db_TR = dy_TK[:, down.outputs : down.outputs + down.used]
        xa_TR = kept.xa_gate_up[:, : both.used]
        return gated_mlp_backward_adapters(kept.gate_up, dh_TF, activation, xa_TR, db_TR, down.rank, slots)

    def _through_post(self, d_TK: torch.Tensor, delta_TD: Any, post: Norm | None, group: Group) -> torch.Tensor:
        """Gradient of what was added to the residual stream, with the group's margin."""
        D = group.outputs
        if post is None:
            return d_TK[:, : D + group.margin]
        dy_TK = d_TK.new_empty((len(d_TK), D + group.margin))
        dy_TK[:, :D] = d_TK[:, :D]
        result_TD = rms_norm_backward(dy_TK[:, :D].contiguous(), delta_TD, post.weight_D, None, post.eps, post.offset)
        dy_TK[:, :D] = result_TD
        return dy_TK
