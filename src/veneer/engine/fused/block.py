"""One decoder block, with forward and backward written by hand as one unit.

A block saves a list of activations between the two, and for each the placement says keep, recompute or offload:

    x          residual stream before the block                         never recomputed (the checkpoint)
    qkv        rotated q, k, v          <- norm, product, rotation      "qkv"
    out        attention's output       <- attention                    "attention" (with its log-sum-exp)
    mid        residual stream between  <- o_proj, sum                  "mid"
    gate_up    gate and up              <- norm, product                "gate_up"
    h          act(gate) * up           <- element-wise                 always recomputed by backward

down_proj is never recomputed: nothing in backward needs its output. The adapters' low-rank activations (x A^T, T x r)
and the norms' 1 / root mean square are so small that they are always kept. The MLP runs over a few thousand tokens at a
time, so that its memory does not grow with the batch. Recomputing runs the same code on the same inputs, in the same
pieces, so that a kept and a recomputed step are equal bit for bit. Frozen weights get no gradient.

The output of attention and of the MLP is added to the residual stream by the norm that follows (`Residual`).

With DoRA, products are saved as they come out, before their columns are scaled: the gradient of the scale needs them.
So q, k, v are not rotated in place, and the outputs of o_proj and of down_proj, the latter always, are saved as well.

Shapes: T tokens, D model width, F width of the MLP, N outputs of q, k, v; E a width with padding after it (`group`).
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from veneer.engine.fused.attention import Attention, attend, attend_backward
from veneer.engine.fused.decoder import Decoder, Layer, Norm
from veneer.engine.fused.documents import Documents
from veneer.engine.fused.group import Group
from veneer.engine.fused.offload import ActivationStore, Offloaded
from veneer.kernels.column_scale import ColumnScale, scaled
from veneer.kernels.gated_mlp import AdapterGradientParts, gated_mlp, gated_mlp_backward, gated_mlp_backward_adapters
from veneer.kernels.low_rank import add_a, add_b
from veneer.kernels.rms_norm import normalize, rms_norm, rms_norm_backward
from veneer.kernels.rope import rope, rope_backward
from veneer.kernels.update import Update

# The tensors of each activation among `SavedActivations`.
FIELDS = {
    "x": ("x", "delta2"),
    "qkv": ("qkv_buffer", "raw", "qkv", "u_qkv"),
    "attention": ("out", "attention"),
    "mid": ("mid", "delta1", "u_o"),
    "gate_up": ("gate_up", "u_gate_up"),
}
ACTIVATIONS = ("qkv", "attention", "mid", "gate_up")  # that may be recomputed
OFFLOADED = ("x", "attention")  # that a policy offloads, the best first: the others are computed again in less time
MAX_RANK = 64  # largest rank of adapters whose gradients the gate's backward computes too
ATTENTION_SLOWER = 1.4  # time of a multiply-add in attention relative to a large product
MLP_TOKENS = 2048  # largest piece; with it, large products are as fast as with all tokens


@dataclass(frozen=True)
class Context:
    """Tensors and limits that all blocks of a pass share.

    Attributes:
        documents: bounds of the packed batch's documents.
        cos_PS, sin_PS: rotary tables.
        scratch: buffer into which 4-bit matrices are dequantized.
        seed: seed of dropout; None: none.
        workspace_bytes: workspace that attention's backward may take.
        store: activations on the host.
        refreshes: whether the adapters may have changed, so that the forward computes DoRA's norms.
    """

    documents: Documents
    cos_PS: torch.Tensor
    sin_PS: torch.Tensor
    scratch: torch.Tensor
    seed: torch.Tensor | None
    workspace_bytes: int
    store: ActivationStore
    refreshes: bool = False


class Residual(NamedTuple):
    """The residual stream with an addition that the next norm makes.

    Attributes:
        x_TD: the stream.
        delta_TD: tensor to add; None: there is none.
        post: norm applied to delta first (Gemma 2), or None.
        update: the adapters' part of delta.
        scale: scale of delta's columns, after the update.
    """

    x_TD: torch.Tensor
    delta_TD: torch.Tensor | None = None
    post: Norm | None = None
    update: Update | None = None
    scale: ColumnScale | None = None

    def norm(self, norm: Norm, y_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add, and normalize into `y_TD`; return the sum and 1 / root mean square of its rows."""
        post_D = self.post.weight_D if self.post is not None else None
        return rms_norm(
            self.x_TD, self.delta_TD, norm.weight_D, norm.eps, norm.offset, y_TD, post_D, self.update, self.scale
        )  # fmt: skip


class SavedActivations:
    """Activations of one block between forward and backward; None: to be recomputed, or on the host."""

    def __init__(self, x_TD: torch.Tensor, rstd1_T: torch.Tensor) -> None:
        self.x: Any = x_TD
        self.rstd1 = rstd1_T
        self.qkv_buffer: Any = None  # the product's output, with padding
        self.raw: Any = None  # q, k, v before their norm or scale, where they have one
        self.qkv: Any = None
        self.u_qkv: Any = None
        self.out: Any = None
        self.attention: Any = None  # log-sum-exp and other tensors of the backend
        self.u_o: Any = None
        self.delta1: Any = None  # input of the post-norm, or of the scale
        self.mid: Any = None
        self.rstd2: Any = None
        self.gate_up: Any = None
        self.u_gate_up: Any = None  # a tensor a piece
        self.u_down: Any = None
        self.delta2: Any = None
        self.offloaded: list[Offloaded] = []

    def drop(self, keep: Collection[str]) -> None:
        """Free the activations that are not saved."""
        for name in ACTIVATIONS:
            if name not in keep:
                vars(self).update(dict.fromkeys(FIELDS[name]))

    def leave(self, names: Collection[str], number: int, store: ActivationStore) -> None:
        """Begin to offload activations of a block."""
        for name in names:
            fields = FIELDS[name]
            self.offloaded.append(store.leave((number, name), {field: getattr(self, field) for field in fields}))
            vars(self).update(dict.fromkeys(fields))

    def fetch(self, store: ActivationStore) -> None:
        """Begin to bring back what was offloaded."""
        for offloaded in self.offloaded:
            store.fetch(offloaded)

    def arrive(self, store: ActivationStore) -> None:
        """Have back what was offloaded."""
        for offloaded in self.offloaded:
            vars(self).update(store.take(offloaded))
        self.offloaded = []


class Block:
    """A decoder block over its groups of linears.

    Args:
        layer: the model's modules.
        decoder: facts all blocks share.
        number: position of the block.
        dtype: compute dtype.

    Attributes:
        weights: groups of linears by name; `groups`: the same in order.
        shards: number of GPUs that its weights are spread over (shards.py).
    """

    def __init__(self, layer: Layer, decoder: Decoder, number: int, dtype: torch.dtype) -> None:
        self.layer, self.decoder, self.number, self.dtype = layer, decoder, number, dtype
        key, device = number * 16, decoder.device
        self.qkv = Group(layer.qkv, dtype, key, device, norm_precedes=True)
        self.o = Group((layer.o,), dtype, key + 4, device, norm_follows=layer.post1 is None)
        self.gate_up = Group(layer.gate_up, dtype, key + 8, device, norm_precedes=True)
        self.down = Group((layer.down,), dtype, key + 12, device, norm_follows=layer.post2 is None)
        self.weights = {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}
        self.groups = tuple(self.weights.values())
        self.attention = Attention(decoder.heads, decoder.scale, layer.window, decoder.softcap)
        self.shards = 1

    @property
    def is_packed(self) -> bool:
        """Whether all its linear layers are in 4 bits."""
        return all(group.is_quantized for group in self.groups)

    @property
    def scratch(self) -> int:
        """The elements of scratch it needs: the MLP uses two matrices together, all others one at a time."""
        sizes = [group.size if group.needs_scratch else 0 for group in self.groups]
        return max(sizes[0], sizes[1], sizes[2] + sizes[3])

    def forward(
        self, stream: Residual, at: Context, keep: frozenset[str], host: frozenset[str] = frozenset()
    ) -> tuple[Residual, SavedActivations]:
        """Return the block's output and the activations saved for backward.

        Args:
            stream: output of the blocks before.
            at: tensors that all blocks share.
            keep: activations that the placement keeps.
            host: activations that it offloads.
        """
        keep = keep | host
        T, D = stream.x_TD.shape
        y_TE = stream.x_TD.new_empty((T, self.qkv.inputs + self.qkv.input_padding))
        saved = SavedActivations(*stream.norm(self.layer.norm1, y_TE[:, :D]))
        self._project_qkv(saved, at, y_TE)
        del y_TE
        saved.out, saved.attention = attend(saved.qkv, at.documents, self.attention)
        saved.drop(keep | {"attention", "mid"})
        y_TE = self._project_out(saved, at)
        saved.drop(keep | {"mid"})
        delta_TD, update = self._mlp(saved, at, y_TE, "gate_up" in keep)
        post = self.layer.post2
        if post is not None or self.down.scale is not None:
            saved.delta2 = delta_TD
        after = Residual(saved.mid, delta_TD, post, update, self.down.scale)
        saved.drop(keep)
        saved.leave(sorted(host), self.number, at.store)
        return after, saved

    def saved_bytes(self, name: str, tokens: int) -> int:
        """Return the bytes of an activation, with the adapters' low-rank activations of its input."""
        layer, heads, itemsize = self.layer, self.decoder.heads, self.dtype.itemsize
        # FlexAttention's own backward keeps q, k, v in whole blocks of tokens.
        flex = self.qkv.outputs if self.decoder.softcap else 0
        keeps_raw = layer.head_norm is not None or self.qkv.scale is not None
        keeps_delta1 = layer.post1 is not None or self.o.scale is not None
        keeps_delta2 = layer.post2 is not None or self.down.scale is not None
        width = {
            "x": self.o.outputs + (self.down.outputs + self.down.padding if keeps_delta2 else 0),
            "qkv": self.qkv.outputs * (2 if keeps_raw else 1) + self.qkv.padding + self.qkv.used,
            "attention": self.o.inputs + heads.query * 4 // itemsize + flex,
            "mid": self.o.outputs + self.o.used + (self.o.outputs + self.o.padding if keeps_delta1 else 0),
            "gate_up": self.gate_up.outputs + self.gate_up.padding + self.gate_up.used,
        }[name]
        return tokens * width * itemsize

    def recompute_cost(self, name: str, tokens: int, longest: int) -> float:
        """Return the work of recomputing one of ACTIVATIONS, in multiply-adds of products; only ratios matter."""
        groups = {"qkv": self.qkv, "mid": self.o, "gate_up": self.gate_up}
        if name in groups:
            return float(tokens * groups[name].size)
        seen = min(longest, self.layer.window or longest) / 2
        return ATTENTION_SLOWER * 2 * tokens * seen * self.o.inputs

    def _project_qkv(self, saved: SavedActivations, at: Context, y_TE: torch.Tensor) -> None:
        """Compute rotated q, k, v of the normalized stream, with padding after them."""
        group, norm = self.qkv, self.layer.head_norm
        raw_TE = y_TE.new_empty((len(y_TE), group.outputs + group.padding))
        saved.u_qkv, _ = group.forward(y_TE, self._matrix(group, at), raw_TE, at.seed)
        saved.qkv_buffer = raw_TE
        saved.qkv = rope(
            raw_TE[:, : group.outputs], self.decoder.heads, at.documents.position_T, at.cos_PS, at.sin_PS, norm,
            group.scale,
        )  # fmt: skip
        saved.raw = raw_TE[:, : group.outputs] if norm or group.scale else None

    def _matrix(self, group: Group, at: Context, offset: int = 0) -> torch.Tensor:
        """Return the matrix of a group, and refresh its scale where the pass does."""
        matrix = group.matrix(at.scratch[offset:])
        if at.refreshes:
            group.refresh(matrix)
        return matrix

    def _project_out(self, saved: SavedActivations, at: Context) -> torch.Tensor:
        """Compute the stream after attention; return it normalized, with padding."""
        group, post = self.o, self.layer.post1
        T, D = saved.x.shape
        delta_TE = saved.x.new_empty((T, D + group.padding))
        out_TE = saved.out
        if group.input_padding:
            out_TE = saved.x.new_empty((T, group.inputs + group.input_padding))
            out_TE[:, : group.inputs] = saved.out
        saved.u_o, update = group.forward(out_TE, self._matrix(group, at), delta_TE, at.seed)
        del out_TE
        delta_TD = delta_TE[:, :D]
        y_TE: torch.Tensor = saved.x.new_empty((T, D + self.gate_up.input_padding))
        stream = Residual(saved.x, delta_TD, post, update, group.scale)
        saved.mid, saved.rstd2 = stream.norm(self.layer.norm2, y_TE[:, :D])
        if post is not None or group.scale is not None:
            saved.delta1 = delta_TD
        return y_TE

    def _mlp_matrices(self, at: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices of gate and up, and of down, in separate parts of the scratch buffer."""
        offset = self.gate_up.size if self.gate_up.needs_scratch else 0
        return self._matrix(self.gate_up, at), self._matrix(self.down, at, offset)

    def _mlp(
        self, saved: SavedActivations, at: Context, y_TE: torch.Tensor, keeps: bool
    ) -> tuple[torch.Tensor, Update | None]:
        """Return the MLP's output, and the adapters' part that is still to be added to it."""
        T, both, down = len(y_TE), self.gate_up, self.down
        both_matrix, down_matrix = self._mlp_matrices(at)
        delta_TE = y_TE.new_empty((T, down.outputs + down.padding))
        buffer_TE = y_TE.new_empty((T if keeps else _longest(T), both.outputs + both.padding))
        h_TE = y_TE.new_empty((_longest(T), down.inputs + down.input_padding))
        u_both, u_down = [], []
        for start, end in _pieces(T):
            gate_up_TE = buffer_TE[start:end] if keeps else buffer_TE[: end - start]
            u, _ = both.forward(y_TE[start:end], both_matrix, gate_up_TE, at.seed, start)
            u_both.append(u)
            h = h_TE[: end - start]
            gated_mlp(gate_up_TE, h[:, : down.inputs], self.decoder.activation, both.scale)
            u, update = down.forward(h, down_matrix, delta_TE[start:end], at.seed, start)
            u_down.append(u)
        saved.gate_up, saved.u_gate_up = (buffer_TE, u_both) if keeps else (None, None)
        saved.u_down = _joined(u_down)
        if update is not None:  # extend the last piece's update to all tokens
            update = down.update(saved.u_down)
        return delta_TE[:, : down.outputs], update

    def backward(self, d_TE: torch.Tensor, saved: SavedActivations, at: Context, is_first: bool) -> None:
        """Accumulate the adapters' gradients, and turn the gradient of the output into that of the input, in place.

        Args:
            d_TE: gradient of the residual stream, in place; the columns after it are scratch.
            saved: activations of the forward; freed on the way.
            at: tensors that all blocks share.
            is_first: whether nothing before this block is trained, so that its input needs no gradient.
        """
        saved.arrive(at.store)
        at = replace(at, refreshes=False)
        self._recompute(saved, at)
        self._mlp_backward(d_TE, saved, at)
        self._attention_backward(d_TE, saved, at, is_first)

    def _recompute(self, saved: SavedActivations, at: Context) -> None:
        """Recompute every activation that backward needs and that was not kept, except gate and up."""
        norm = self.layer.norm1
        T, D = saved.x.shape
        if saved.qkv is None:
            y_TE = saved.x.new_empty((T, D + self.qkv.input_padding))
            normalize(saved.x, saved.rstd1, norm.weight_D, norm.offset, y_TE[:, :D])
            self._project_qkv(saved, at, y_TE)
            del y_TE
        if saved.out is None:
            saved.out, saved.attention = attend(saved.qkv, at.documents, self.attention)
        if saved.mid is None:
            self._project_out(saved, at)

    def _mlp_backward(self, d_TE: torch.Tensor, saved: SavedActivations, at: Context) -> None:
        """Turn the gradient of the MLP's output into that of its input."""
        layer, T, D = self.layer, len(saved.x), saved.x.shape[1]
        both, down, norm = self.gate_up, self.down, layer.norm2
        both_matrix, down_matrix = self._mlp_matrices(at)
        dy_TE = self._through_post(d_TE, saved.delta2, layer.post2, down, saved.u_down)
        saved.delta2 = None
        down.add_b(saved.u_down, dy_TE[:, :D])
        longest, parts = _longest(T), self._gate_parts(T, saved.x)
        dx_TE = saved.x.new_empty((T, D + both.padding))
        dh_TE = saved.x.new_empty((longest, down.inputs + down.padding))
        made = saved.gate_up is None
        buffer_TE = saved.x.new_empty((longest, both.outputs + both.padding)) if made else saved.gate_up
        y_TE = saved.x.new_empty((longest if made else 0, D + both.input_padding))
        v_both = []
        for number, (start, end) in enumerate(_pieces(T)):
            size = end - start
            if made:
                gate_up_TE, y = buffer_TE[:size], y_TE[:size]
                normalize(saved.mid[start:end], saved.rstd2[start:end], norm.weight_D, norm.offset, y[:, :D])
                u_both, _ = both.forward(y, both_matrix, gate_up_TE, at.seed, start)
            else:
                gate_up_TE, u_both = buffer_TE[start:end], saved.u_gate_up[number]
            v_down, _ = down.backward(dy_TE[start:end], down_matrix, dh_TE[:size], at.seed, start)
            self._gate_backward(gate_up_TE, dh_TE[:size], u_both, v_down, parts, start, at)
            v, update = both.backward(gate_up_TE, both_matrix, dx_TE[start:end], at.seed, start)
            v_both.append(v)
        if parts is not None and parts.a_PrF.numel():
            add_a(parts.a_PrF, down.grad_a)
            add_b(parts.b_PRF, both.grad_b, both.members)
        if parts is not None and both.scale is not None:
            both.add_m(parts.sums_PF)
        saved.gate_up = None
        v = _joined(v_both)
        del dh_TE, buffer_TE, gate_up_TE, y_TE, parts, v_both
        if update is not None:  # extend the last piece's update to all tokens
            update = Update(dx_TE[:, D : D + both.used], update.b_RN)
        both.add_a(v, saved.mid, at.seed, (saved.rstd2, norm.weight_D, norm.offset))
        self._norm_backward(dx_TE[:, :D], saved.mid, saved.rstd2, norm, d_TE, update)
        saved.mid = None

    def _gate_parts(self, tokens: int, like: torch.Tensor) -> AdapterGradientParts | None:
        """Allocate the gradients that the gate's backward computes; None where not every linear has its adapter."""
        down, both = self.down, self.gate_up
        ranks = {member.rank for member in (*both.members, *down.members)}
        rank, is_scaled = down.rank, both.scale is not None
        if ranks != {rank} or not 0 < rank <= MAX_RANK or both.dropout_p or down.dropout_p:
            if not is_scaled:
                return None
            rank = 0
        return AdapterGradientParts.empty(_longest(tokens), down.inputs, rank, both.used, like, is_scaled)

    def _gate_backward(
        self, gate_up_TE: torch.Tensor, dh_TE: torch.Tensor, u_both: torch.Tensor, v_down: torch.Tensor,
        parts: AdapterGradientParts | None, start: int, at: Context,
    ) -> None:  # fmt: skip
        """Overwrite gate and up with their gradient, and compute the adapters' gradients that need them."""
        both, down = self.gate_up, self.down
        dh_TF, activation = dh_TE[:, : down.inputs], self.decoder.activation
        if parts is not None:
            rank = max(1, both.rank)
            slots = both.members[0].first // rank, both.members[-1].first // rank
            gated_mlp_backward_adapters(
                gate_up_TE, dh_TF, activation, u_both, v_down, slots, parts, start == 0, both.scale
            )
            if parts.a_PrF.numel():
                return
        else:
            gated_mlp_backward(gate_up_TE, dh_TF, activation)
        down.add_a(v_down, dh_TF, at.seed, skipped=start)
        both.add_b(u_both, gate_up_TE[:, : both.outputs])

    def _attention_backward(self, d_TE: torch.Tensor, saved: SavedActivations, at: Context, is_first: bool) -> None:
        """Turn the gradient of attention's output into that of its input."""
        layer, T, D = self.layer, len(saved.x), saved.x.shape[1]
        dy_TE = self._through_post(d_TE, saved.delta1, layer.post1, self.o, saved.u_o)
        saved.delta1 = None
        dout_TE = saved.x.new_empty((T, self.o.inputs + self.o.padding))
        v_o, _ = self.o.backward(dy_TE, self.o.matrix(at.scratch), dout_TE, at.seed)
        self.o.backward_adapters(dy_TE[:, :D], saved.out, saved.u_o, v_o, at.seed)
        dq_THC, dk_TKC, dv_TKC = attend_backward(
            dout_TE[:, : self.o.inputs], saved.qkv, saved.attention, at.documents, self.attention, at.workspace_bytes
        )
        del dout_TE, dy_TE
        # q, k and v are not needed any more: their gradient overwrites the product's output, unless that is.
        buffer_TE, norm, outputs, raw_TN = saved.qkv_buffer, layer.norm1, self.qkv.outputs, saved.raw
        if raw_TN is not None:
            buffer_TE = torch.empty_like(buffer_TE)
        saved.out = saved.attention = saved.qkv = saved.raw = saved.qkv_buffer = None
        rope_backward(
            dq_THC, dk_TKC, dv_TKC, self.decoder.heads, at.documents.position_T, at.cos_PS, at.sin_PS,
            buffer_TE[:, :outputs], raw_TN, layer.head_norm, self.qkv.scale,
        )  # fmt: skip
        del dq_THC, dk_TKC, dv_TKC
        if self.qkv.scale is not None:
            self.qkv.scale_backward(buffer_TE[:, :outputs], raw_TN, buffer_TE[:, :outputs])
        del raw_TN
        scaling = (saved.rstd1, norm.weight_D, norm.offset)
        if is_first:
            v_qkv = self.qkv.project_gradient(buffer_TE)
        else:
            dx_TE = saved.x.new_empty((T, D + self.qkv.padding))
            v_qkv, update = self.qkv.backward(buffer_TE, self.qkv.matrix(at.scratch), dx_TE, at.seed)
        self.qkv.backward_adapters(buffer_TE[:, :outputs], saved.x, saved.u_qkv, v_qkv, at.seed, scaling)
        if not is_first:
            self._norm_backward(dx_TE[:, :D], saved.x, saved.rstd1, norm, d_TE, update)

    def _norm_backward(
        self, dx_TD: torch.Tensor, x_TD: torch.Tensor, rstd_T: torch.Tensor, norm: Norm, d_TE: torch.Tensor, update: Any
    ) -> None:
        D = x_TD.shape[1]
        rms_norm_backward(dx_TD, x_TD, norm.weight_D, rstd_T, norm.eps, norm.offset, d_TE[:, :D], update)

    def _through_post(
        self, d_TE: torch.Tensor, delta_TD: Any, post: Norm | None, group: Group, u_TR: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of a product that is added to the residual stream, with padding after it."""
        D = group.outputs
        if post is None and group.scale is None:
            return d_TE
        dy_TE = d_TE.new_empty((len(d_TE), D + group.padding))
        dy_TD = d_TE[:, :D]
        if post is not None:
            dy_TE[:, :D] = dy_TD
            dy_TD = dy_TE[:, :D]
            y_TD = delta_TD.contiguous() if group.scale is None else scaled(delta_TD, group.scale).to(delta_TD.dtype)
            rms_norm_backward(dy_TD, y_TD, post.weight_D, None, post.eps, post.offset)
        if group.scale is not None:
            group.scale_backward(dy_TD, delta_TD, dy_TE[:, :D], u_TR)
        return dy_TE


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _pieces(tokens: int) -> list[tuple[int, int]]:
    """Return bounds of the MLP's pieces: as few as possible, of nearly equal multiples of 64 tokens."""
    size = _longest(tokens)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _longest(tokens: int) -> int:
    """Return the tokens of the longest piece."""
    count = -(-tokens // MLP_TOKENS)
    return min(tokens, -(-tokens // count // 64) * 64)
