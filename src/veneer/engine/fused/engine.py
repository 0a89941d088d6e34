"""The fused engine: whole passes over hand-written blocks. See `veneer.engine.fused`."""

from typing import Any

import torch
import torch.nn.functional as F

from veneer.data import Batch
from veneer.engine.fused.attention import Documents
from veneer.engine.fused.block import TENSORS, Block, Context, Kept
from veneer.engine.fused.family import Decoder, NotCoveredError, read
from veneer.engine.fused.graphs import Graphs, Inputs
from veneer.kernels.place import place, placement_of
from veneer.kernels.rms_norm import rms_norm, rms_norm_backward
from veneer.kernels.softmax_loss import softmax_loss

LOGITS_BYTES = 256 * 2**20  # of logits made at a time


class FusedEngine:
    """Runs a PEFT model's blocks by hand-written code.

    Args:
        model: From `veneer.model.attach` or `load_adapter`.
        keep: Tensors of a block that are kept from forward to backward, of `block.TENSORS`.
        keep_dequantized: Hold 4-bit weights as 16-bit matrices too.
        graphs: Record passes of a shape that comes again.

    Raises:
        NotCoveredError: The model has parts this engine does not compute.
    """

    name = "fused"
    isolates_documents = True

    def __init__(
        self, model: Any, keep: frozenset[str] = frozenset(TENSORS), keep_dequantized: bool = False, graphs: bool = True
    ) -> None:
        self.model = model
        self.decoder: Decoder = read(model)
        weight = self.decoder.embed.weight
        self._device, self._dtype = weight.device, weight.dtype
        if self._dtype == torch.float16:
            raise NotCoveredError("float16 compute")
        self.blocks = [Block(layer, self.decoder, n, self._dtype) for n, layer in enumerate(self.decoder.layers)]
        self.keep = keep
        groups = [group for block in self.blocks for group in block.groups]
        if keep_dequantized:
            for group in groups:
                group.keep_dequantized()
        quantized = [group.size for group in groups if group.is_quantized and not keep_dequantized]
        self._scratch = weight.new_empty(max(quantized, default=0))
        self._flatten(groups)
        self._adapters = placement_of([shadow for group in groups for shadow in group.shadows()])
        self._seed = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._has_dropout = any(group.dropout_p for group in groups)
        self._graphs = Graphs(self._pass) if graphs and self._device.type == "cuda" else None
        # The last is the longest; the others stay, since recorded passes read them.
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _flatten(self, groups: list[Any]) -> None:
        """One buffer for all parameters, one for all gradients; PEFT's become views of them.

        `master` is the first of them: an optimizer of that one parameter updates all adapters in one launch. Its
        8-bit states (blocks of 256) are those of separate parameters where each one's size is a multiple of 256.
        """
        ordered = []
        for group in groups:
            adapted = [linear for linear in group.linears if linear.a is not None]
            ordered += [linear.a for linear in adapted] + [linear.b for linear in adapted]
        total = sum(parameter.numel() for parameter in ordered)
        flat = torch.empty(total, dtype=torch.float32, device=self._device)
        self._flat_grad = torch.zeros_like(flat)
        self._views, at = [], 0
        for parameter in ordered:
            part = slice(at, at + parameter.numel())
            flat[part] = parameter.data.reshape(-1)
            parameter.data = flat[part].view(parameter.shape)
            self._views.append((parameter, self._flat_grad[part].view(parameter.shape)))
            at += parameter.numel()
        self.master = torch.nn.Parameter(flat)
        at = 0
        for group in groups:
            size_a = group.used * group.inputs
            size_b = sum((end - start) * group.rank for start, end, slot in group.members if slot >= 0)
            group.grad_a = self._flat_grad[at : at + size_a].view(group.used, group.inputs)
            group.grad_b = self._flat_grad[at + size_a : at + size_a + size_b]
            at += size_a + size_b

    def _gradients(self) -> None:
        """Gradients that the optimizer dropped begin at zero, in the flat buffer."""
        if self.master.grad is None or self._views[0][0].grad is None:
            self._flat_grad.zero_()
            self.master.grad = self._flat_grad
            for parameter, view in self._views:
                parameter.grad = view

    @torch.no_grad()
    def forward_backward(self, batch: Batch, scale: float) -> torch.Tensor:
        """See `Engine.forward_backward`."""
        self._gradients()
        if self._has_dropout:
            self._seed.random_(0, 2**31)
        inputs = self._bring(batch, scale)
        return self._graphs.run(inputs) if self._graphs is not None else self._pass(inputs)

    def _pass(self, inputs: Inputs) -> torch.Tensor:
        """Forward and backward, on the device alone."""
        at = self._context(inputs.documents, training=True)
        place(self._adapters)
        x_TD, delta_TD, kept, post = self._forward(inputs.ids_T, at, True)
        losses_N, d_TK = self._head(inputs, x_TD, delta_TD, post, True)
        total = (losses_N.double() * inputs.weights_N).sum()
        for block in reversed(self.blocks):
            block.backward(d_TK, kept.pop(), at, block.number == 0)
        return total

    @torch.no_grad()
    def losses(self, batch: Batch) -> torch.Tensor:
        """See `Engine.losses`."""
        inputs = self._bring(batch, 0.0)
        place(self._adapters)
        x_TD, delta_TD, _, post = self._forward(inputs.ids_T, self._context(inputs.documents, training=False), False)
        losses_N, _ = self._head(inputs, x_TD, delta_TD, post, False)
        document_T = torch.repeat_interleave(torch.tensor(batch.lengths)).to(self._device)
        result = torch.zeros(len(batch.lengths), dtype=torch.float64, device=self._device)
        return result.index_add_(0, document_T[inputs.index_N], losses_N.double() * inputs.weights_N)

    def _bring(self, batch: Batch, scale: float) -> Inputs:
        """The batch on the device; what is trained is found on the host, so that nothing waits."""
        index_N = (batch.targets_T >= 0).nonzero().squeeze(1)
        weights_N = batch.weights_T[index_N]
        tensors = [batch.ids_T, index_N, batch.targets_T[index_N], weights_N, weights_N * scale]
        ids_T, index_N, targets_N, weights_N, factor_N = (t.to(self._device, non_blocking=True) for t in tensors)
        documents = Documents.of(batch.lengths, self._device)
        self._rotary(documents.longest)
        return Inputs(ids_T, index_N, targets_N, weights_N, factor_N, documents)

    def _context(self, documents: Documents, training: bool) -> Context:
        cos_PS, sin_PS = self._rotary(documents.longest)
        seed = self._seed if training and self._has_dropout else None
        return Context(documents, cos_PS, sin_PS, self._scratch, seed)

    def _rotary(self, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of the model's own rotary module, float32, for the positions there are."""
        if not self._tables or len(self._tables[-1][0]) < longest:
            places = torch.arange(-(-longest // 1024) * 1024, device=self._device)[None]
            cos, sin = self.decoder.rotary(self.master.data[:1], places)
            half = cos.shape[-1] // 2
            self._tables.append((cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()))
        return self._tables[-1]

    def _forward(self, ids_T: torch.Tensor, at: Context, training: bool) -> Any:
        """Residual stream and last delta (not yet added), kept tensors of each block, the last post-norm."""
        x_TD, delta_TD, post = self.decoder.embed(ids_T), None, None
        kept: list[Kept] = []
        for block in self.blocks:
            # The last block's tensors are needed at once, whatever the plan keeps of the others.
            keep = frozenset(TENSORS) if block.number == len(self.blocks) - 1 else self.keep
            x_TD, delta_TD, of_block = block.forward(x_TD, delta_TD, post, at, keep)
            post = block.layer.post2
            if training:
                kept.append(of_block)
        return x_TD, delta_TD, kept, post

    def _head(
        self, inputs: Inputs, x_TD: torch.Tensor, delta_TD: Any, post: Any, training: bool
    ) -> tuple[torch.Tensor, Any]:
        """Losses of trained tokens, and in training the gradient of the residual stream."""
        norm, decoder = self.decoder.norm, self.decoder
        y_TD = torch.empty_like(x_TD)
        x_TD, rstd_T = rms_norm(x_TD, delta_TD, norm.weight_D, norm.eps, norm.offset, y_TD, post and post.weight_D)
        index_N, targets_N, factor_N = inputs.index_N, inputs.targets_N, inputs.factor_N
        hidden_ND = y_TD[index_N]
        weight_VD = decoder.head.weight
        losses_N = torch.empty(len(index_N), dtype=torch.float32, device=self._device)
        d_ND = torch.empty_like(hidden_ND) if training else None
        rows = max(16, LOGITS_BYTES // (weight_VD.shape[0] * weight_VD.element_size()) // 16 * 16)
        for start in range(0, len(index_N), rows):
            part = slice(start, start + rows)
            logits_nV = F.linear(hidden_ND[part], weight_VD)
            softmax_loss(logits_nV, targets_N[part], factor_N[part], losses_N[part], decoder.head_cap, training)
            if d_ND is not None:
                torch.mm(logits_nV, weight_VD, out=d_ND[part])
            del logits_nV
        if d_ND is None:
            return losses_N, None
        y_TD.zero_()
        y_TD[index_N] = d_ND
        D = x_TD.shape[1]
        margin = max(max(block.o.margin, block.down.margin) for block in self.blocks)
        d_TK = x_TD.new_zeros((len(x_TD), D + margin))
        rms_norm_backward(y_TD, x_TD, norm.weight_D, rstd_T, norm.eps, norm.offset, d_TK[:, :D])
        return losses_N, d_TK
