"""The fused engine: whole passes over hand-written blocks. See `veneer.engine.fused`."""

from typing import Any

import torch
import torch.nn.functional as F

from veneer.data import Batch
from veneer.engine.fused.attention import Documents
from veneer.engine.fused.block import TENSORS, Block, Context, Kept
from veneer.engine.fused.family import Decoder, NotCoveredError, read
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

    Raises:
        NotCoveredError: The model has parts this engine does not compute.
    """

    name = "fused"
    isolates_documents = True

    def __init__(self, model: Any, keep: frozenset[str] = frozenset(TENSORS), keep_dequantized: bool = False) -> None:
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
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

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

    def _refresh(self) -> None:
        """Round the adapters to the compute precision, into the margins of the matrices."""
        place(self._adapters)

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
        self._refresh()
        if self._has_dropout:
            self._seed.random_(0, 2**31)
        batch, index_N = self._bring(batch)
        at = self._context(batch, training=True)
        hidden_TD, delta_TD, kept, post = self._forward(batch, at, True)
        losses_N, d_TK = self._head(batch, index_N, hidden_TD, delta_TD, post, scale)
        total = (losses_N.double() * batch.weights_T[index_N]).sum()
        for block, of_block in zip(reversed(self.blocks), reversed(kept)):
            kept.pop()
            block.backward(d_TK, of_block, at, block.number == 0)
        return total

    @torch.no_grad()
    def losses(self, batch: Batch) -> torch.Tensor:
        """See `Engine.losses`."""
        self._refresh()
        batch, index_N = self._bring(batch)
        at = self._context(batch, training=False)
        hidden_TD, delta_TD, _, post = self._forward(batch, at, False)
        losses_N, _ = self._head(batch, index_N, hidden_TD, delta_TD, post, None)
        document_T = torch.repeat_interleave(torch.tensor(batch.lengths)).to(self._device)
        result = torch.zeros(len(batch.lengths), dtype=torch.float64, device=self._device)
        return result.index_add_(0, document_T[index_N], losses_N.double() * batch.weights_T[index_N])

    def _bring(self, batch: Batch) -> tuple[Batch, torch.Tensor]:
        """The batch on the device, and where its trained tokens stand (found on the host: nothing waits)."""
        index_N = (batch.targets_T >= 0).nonzero().squeeze(1)
        return batch.to(str(self._device)), index_N.to(self._device, non_blocking=True)

    def _context(self, batch: Batch, training: bool) -> Context:
        documents = Documents.of(batch.lengths, self._device)
        cos_PS, sin_PS = self._rotary(documents.longest)
        seed = self._seed if training and self._has_dropout else None
        return Context(documents, cos_PS, sin_PS, self._scratch, seed)

    def _rotary(self, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of the model's own rotary module, float32, for the positions there are."""
        if self._tables is None or len(self._tables[0]) < longest:
            places = torch.arange(-(-longest // 1024) * 1024, device=self._device)[None]
            cos, sin = self.decoder.rotary(self.master.data[:1], places)
            half = cos.shape[-1] // 2
            self._tables = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return self._tables

    def _forward(self, batch: Batch, at: Context, training: bool) -> Any:
        """Residual stream and last delta (not yet added), kept tensors of each block, the last post-norm."""
        x_TD, delta_TD, post = self.decoder.embed(batch.ids_T), None, None
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
        self, batch: Batch, index_N: torch.Tensor, x_TD: torch.Tensor, delta_TD: Any, post: Any, scale: float | None
    ) -> tuple[torch.Tensor, Any]:
        """Losses of trained tokens, and the gradient of the residual stream (with `scale`)."""
        norm, decoder = self.decoder.norm, self.decoder
        y_TD = torch.empty_like(x_TD)
        x_TD, rstd_T = rms_norm(x_TD, delta_TD, norm.weight_D, norm.eps, norm.offset, y_TD, post and post.weight_D)
        hidden_ND, targets_N = y_TD[index_N], batch.targets_T[index_N]
        weight_VD = decoder.head.weight
        factor_N = batch.weights_T[index_N] * (scale or 0.0)
        losses_N = torch.empty(len(index_N), dtype=torch.float32, device=self._device)
        d_ND = torch.empty_like(hidden_ND) if scale is not None else None
        rows = max(16, LOGITS_BYTES // (weight_VD.shape[0] * weight_VD.element_size()) // 16 * 16)
        for start in range(0, len(index_N), rows):
            part = slice(start, start + rows)
            logits_nV = F.linear(hidden_ND[part], weight_VD)
            softmax_loss(
                logits_nV, targets_N[part], factor_N[part], losses_N[part], decoder.head_cap, scale is not None
            )
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
