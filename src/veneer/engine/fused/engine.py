"""The fused engine runs whole passes over hand-written blocks. See `veneer.engine.fused`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from veneer.data.batch import Batch
from veneer.engine.fused.block import Block, Context, Residual, SavedActivations
from veneer.engine.fused.decoder import Decoder, NotCoveredError, read
from veneer.engine.fused.documents import Documents
from veneer.engine.fused.ends import Ends
from veneer.engine.fused.graphs import Graphs, Inputs, rounded
from veneer.engine.fused.group import Group
from veneer.engine.fused.offload import ActivationStore
from veneer.engine.fused.pinned import PinnedMemory
from veneer.engine.fused.policy import Demand, checkpointed, choose_placement, tightest, uniform
from veneer.engine.fused.shards import Shards
from veneer.engine.fused.streaming import StreamedWeights
from veneer.engine.interface import BatchShapes
from veneer.engine.objective import LIKELIHOOD, Objective, StepOutput, TrainedTokens
from veneer.engine.placement import H100, MemoryPlacement, Rates, WeightState
from veneer.kernels.cast import cast_all, cast_table
from veneer.kernels.launch import HAS_TRITON
from veneer.kernels.rms_norm import rms_norm_backward
from veneer.kernels.softmax_loss import softmax_loss
from veneer.machine.peers import uncounted_bytes
from veneer.machine.ranks import Ranks

LOGITS_BYTES = 256 * 2**20  # logits computed at a time
UNKNOWN = 2**62  # bytes, more than any device has: the peak of a pass that does not fit
TRIED = 4  # blocks that go backward in a pass whose memory is measured
UNUSED = 0.02  # share of the budget, left over by a placement, that is worth choosing anew
TIGHTER = 0.95  # share of its budget within which a placement is chosen anew, when memory has run out


class FusedEngine:
    """Runs a PEFT model's blocks by hand-written code.

    Args:
        model: PEFT model from `veneer.model.attach` or `load_adapter`.
        gradient_checkpointing: the setting; auto recomputes as true does, until `plan_memory` has measured.
        graphs: whether passes of a shape that recurs are recorded as CUDA graphs.
        ranks: processes whose GPUs the frozen 4-bit weights of blocks are spread over; None: each has all of them.

    Attributes:
        placement: placement of its blocks' tensors; see `apply`.
        is_sharded: whether weights of blocks are spread over GPUs.

    Raises:
        NotCoveredError: the model has parts this engine does not compute.
    """

    name = "fused"
    is_reference = False

    def __init__(
        self,
        model: Any,
        gradient_checkpointing: bool | str = False,
        graphs: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.decoder: Decoder = read(model)
        self._device, self._dtype = self.decoder.device, self.decoder.embed.weight.dtype
        if self._dtype == torch.float16:
            raise NotCoveredError("float16 compute")
        if self.on_gpu and not HAS_TRITON:
            raise NotCoveredError("a machine without Triton")
        self.blocks = [Block(layer, self.decoder, n, self._dtype) for n, layer in enumerate(self.decoder.layers)]
        self._scratch = torch.empty(0, dtype=self._dtype, device=self._device)
        memory = PinnedMemory(self._device)
        self.ends = Ends(self.decoder, memory)
        packed = [block for block in self.blocks if block.is_packed]
        shards = Shards(ranks, self._device, packed) if ranks is not None and packed else None
        self.is_sharded = shards is not None
        self._weights = StreamedWeights(self._device, memory, shards)
        self._store = ActivationStore(self._device, memory)
        self._flatten([group for block in self.blocks for group in block.groups])
        self.has_scales = any(group.scale is not None for block in self.blocks for group in block.groups)
        self._is_stale = True  # the adapters may have changed since the scales of outputs were computed
        self._seed = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.rates = H100
        self._demand: Demand | None = None
        self._loss_peak = 0
        # Batches are padded whether or not passes are recorded, so that both give the same bits.
        self._pads = self._device.type == "cuda" and self.is_recordable
        # Weights on the host may not fit the device.
        first = tightest(self.blocks) if self.is_on_host else checkpointed(self.blocks, gradient_checkpointing)
        self._may_record = graphs and self._pads and not self.is_sharded
        self.apply(replace(first, records_passes=self._may_record))
        # The last is the longest; the others are not freed, since recorded passes read them.
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def is_recordable(self) -> bool:
        """Whether passes over batches of one shape launch the same kernels on the same addresses.

        FlexAttention's masks are new tensors for each batch, and attention in float32 depends on lengths on the host: a
        recorded pass would see neither change.
        """
        return self.blocks[0].attention.depends_on_shapes(self.decoder.norm.weight_D)

    @property
    def shares_prompts(self) -> bool:
        """Whether a pair's prompt goes through the blocks once; FlexAttention's masks have no such keys."""
        return self.blocks[0].attention.shares_keys(self.decoder.norm.weight_D)

    @property
    def has_dropout(self) -> bool:
        """Whether training passes drop adapters' inputs."""
        return any(group.dropout_p for block in self.blocks for group in block.groups)

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a CUDA device, whose memory can be measured."""
        return bool(self._device.type == "cuda")

    def plan_memory(
        self,
        shapes: BatchShapes,
        gradient_checkpointing: bool | str,
        later_bytes: int,
        budget_bytes: int | None = None,
        rates: Rates = H100,
    ) -> MemoryPlacement:
        """See `Engine.plan_memory` and `plan_within`."""
        self.rates = rates
        if self.on_gpu and gradient_checkpointing == "auto":
            torch.cuda.empty_cache()
            budget = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            if budget_bytes is not None:
                budget = min(budget, budget_bytes - uncounted_bytes())
            return self.plan_within(shapes, budget - later_bytes)
        if shapes.varies:  # no memory was reserved for recorded passes
            self.apply(replace(self.placement, records_passes=False))
        return self.placement

    def tighten(self) -> str | None:
        """See `Engine.tighten`: the placement of a smaller budget, or the tightest there is."""
        before = self.placement
        if self._demand is None:
            return None
        budget = before.budget_bytes
        while budget > before.budget_bytes // 4:
            budget = int(budget * TIGHTER)
            after = choose_placement(self.blocks, self._demand, budget, self._may_record, self.rates)
            if after.bytes < before.bytes:
                self.apply(after)
                return f"{before.describe()} before, now {after.describe()}"
        return None

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """See `Engine.adapter_off`. PEFT's modules are not called here, so the adapter's matrices are zeroed."""
        with self.model.disable_adapter():
            before = self.master.detach().clone()
            self.master.data.zero_()
            self._switch(off=True)
            try:
                yield
            finally:
                self.master.data.copy_(before)
                self._switch(off=False)

    def _switch(self, off: bool) -> None:
        """Let the next pass compute the scales of outputs, with or without the adapters."""
        self._is_stale = True
        for block in self.blocks:
            for group in block.groups:
                group.is_off = off

    @contextmanager
    def dropout_off(self) -> Iterator[None]:
        """See `Engine.dropout_off`."""
        groups = [group for block in self.blocks for group in block.groups]
        before = [group.dropout_p for group in groups]
        try:
            for group in groups:
                group.dropout_p = 0.0
            yield
        finally:
            for group, p in zip(groups, before, strict=True):
                group.dropout_p = p

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {"chunked_head": True}

    def apply(self, placement: MemoryPlacement) -> None:
        """Apply a placement; recorded passes are dropped."""
        self.placement = placement
        self._graphs = None
        self.ends.place(placement.streams_ends)
        streamed: dict[int, Sequence[Group]] = {}
        for block, chosen in zip(self.blocks, placement.blocks, strict=True):
            for name, group in block.weights.items():
                if chosen.weights.get(name) == WeightState.DEQUANTIZED:
                    group.keep_dequantized()
                else:
                    group.drop_dequantized()
            if chosen.streams or block.shards > 1:
                streamed[block.number] = [group for group in block.groups if group.needs_scratch]
            else:
                for group in block.groups:
                    group.to_device()
        self._weights.stream(streamed)
        size = max(block.scratch for block in self.blocks)
        if size != len(self._scratch):
            self._scratch = self._scratch.new_empty(size)
        casts = [cast for block in self.blocks for group in block.groups for cast in group.casts()]
        self._adapters = cast_table(casts)
        # What the buffers of streamed weights hold when a pass begins differs from pass to pass.
        records = placement.records_passes and not placement.streams
        self._graphs = Graphs(self._pass, self._store.drop) if records else None

    def plan_within(self, shapes: BatchShapes, budget_bytes: int) -> MemoryPlacement:
        """Keep as much as a budget allows; see `policy.choose_placement`. Call it before training: it drops gradients.

        Args:
            shapes: lengths of the largest batches.
            budget_bytes: memory of the device for tensors, those allocated now included.
        """
        assert self.on_gpu, "memory can be measured on CUDA devices only"
        self._demand, fullest = self._measure(shapes, budget_bytes)
        self.apply(choose_placement(self.blocks, self._demand, budget_bytes, self._may_record, self.rates))
        self._verify(fullest, budget_bytes)
        if self._graphs is not None and shapes.varies:
            self._graphs.reserve(self._to_device(fullest, True), LIKELIHOOD)
            self.master.grad = None
        return self.placement

    def _verify(self, fullest: Batch, budget_bytes: int) -> None:
        """Run the fullest batch with the placement, and correct a peak that was predicted too low or too high.

        One that was too low is tightened. One that was too high is chosen anew, once, with the memory that it leaves:
        the tensors that a pass recomputes are counted in its peak even where a placement keeps them.
        """
        is_final = False
        while True:
            placement, demand = self.placement, self._demand
            assert demand is not None
            peak = max(self._try(fullest))
            if peak > budget_bytes:
                is_final = True
                if self.tighten() is None:
                    break
            elif is_final or placement.peak_bytes - peak <= UNUSED * budget_bytes:
                break
            else:
                is_final = True
                self._demand = replace(demand, least_bytes=demand.least_bytes - (placement.peak_bytes - peak))
                self.apply(choose_placement(self.blocks, self._demand, budget_bytes, self._may_record, self.rates))
        if peak == UNKNOWN:
            raise torch.OutOfMemoryError("The longest micro-batch does not fit with any placement. ")
        self.placement = replace(self.placement, budget_bytes=budget_bytes, least_bytes=peak - self.placement.bytes)

    def _try(self, batch: Batch) -> tuple[int, int]:
        """Return the peaks of a pass over a dummy batch, until its loss is computed and afterwards.

        Where it does not fit, they are more than any device has.
        """
        try:
            backward = self._peak_of(partial(self._pass, self._to_device(batch, True), depth=TRIED))
            return self._loss_peak, backward
        except torch.OutOfMemoryError:
            pass  # what the error refers to must be freed before memory is
        finally:
            self.master.grad = None
        self._store.release(0)
        torch.cuda.empty_cache()
        return UNKNOWN, UNKNOWN

    def _measure(self, shapes: BatchShapes, budget_bytes: int) -> tuple[Demand, Batch]:
        """Measure the memory of passes that keep nothing; also return the fullest batch.

        The first of three placements that fits is measured: inputs of blocks on the device, on the host, and weights
        there too. Weights that were loaded to the host stay there.
        """
        lengths = shapes.largest
        # Where lengths vary, a batch may have one length or several, and attention has a backend for each case.
        several = [_dummy(lengths, shapes.shared)]
        if shapes.varies and lengths[-1] > 1 and not any(shapes.shared):
            several.append(_dummy((*lengths[:-1], lengths[-1] - 1, 1)))
        if shapes.documents:
            several.append(_dummy(shapes.documents))
        tokens = several[0].tokens
        bases = [] if self.is_on_host else [uniform(self.blocks, (), ()), tightest(self.blocks, streams=False)]
        if sum(block.saved_bytes("x", tokens) for block in self.blocks) > budget_bytes:
            bases = bases[1:]
        for base in (*bases, tightest(self.blocks)):
            self.apply(base)
            before = torch.cuda.memory_allocated()
            peaks = [self._try(some) for some in several]
            fullest, (loss, backward) = max(zip(several, peaks, strict=True), key=lambda tried: max(tried[1]))
            peak = max(loss, backward)
            if peak <= budget_bytes:
                break
        held_out = (
            self._peak_of(lambda: self.token_logprobs(_dummy(shapes.held_out))) - before if shapes.held_out else 0
        )
        usual = self._to_device(several[-1], training=False).documents
        backend = self.blocks[0].attention.backend(usual, self.decoder.norm.weight_D)
        rows = len(lengths) if backend == "cudnn" else 0
        return Demand(
            rounded(tokens),
            max(lengths),
            rows,
            peak,
            max(0, peak - before),
            held_out,
            shapes.varies,
            bool(shapes.documents),
            base,
            self.ends.bytes,
            loss,
            backward,
        ), fullest

    @property
    def is_on_host(self) -> bool:
        """Whether weights are in host memory, for want of memory on the device."""
        return not self.is_sharded and any(
            packed.weights.device != self._device for b in self.blocks for g in b.groups for packed in g.packed
        )

    @torch.no_grad()
    def _peak_of(self, compute: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        compute()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def _flatten(self, groups: list[Any]) -> None:
        """Move all adapter parameters into one buffer, and all gradients into another; PEFT's become views of them.

        An optimizer of the one parameter `master` updates all adapters in one launch. Its 8-bit states (blocks of 256)
        equal those of separate parameters where each one's size is a multiple of 256.
        """
        ordered = []
        for group in groups:
            adapted = [linear for linear in group.linears if linear.a is not None]
            ordered += [linear.a for linear in adapted] + [linear.b for linear in adapted]
            ordered += [linear.magnitude for linear in adapted if linear.magnitude is not None]
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
            ranks = sum(member.rank for member in group.members)
            size_a = ranks * group.inputs
            size_b = sum((member.end - member.start) * member.rank for member in group.members)
            group.grad_a = self._flat_grad[at : at + size_a].view(ranks, group.inputs)
            group.grad_b = self._flat_grad[at + size_a : at + size_a + size_b]
            at += size_a + size_b
            for linear in group.linears:
                size_m = 0 if linear.magnitude is None else len(linear.magnitude)
                group.grad_m.append(self._flat_grad[at : at + size_m] if size_m else None)
                at += size_m

    def _gradients(self) -> None:
        """Restore gradients that the optimizer set to None, as zeros in the flat buffer: a step begins."""
        if self.master.grad is None or self._views[0][0].grad is None:
            self._is_stale = True
            self._flat_grad.zero_()
            self.master.grad = self._flat_grad
            for parameter, view in self._views:
                parameter.grad = view

    @torch.no_grad()
    def forward_backward(self, batch: Batch, objective: Objective) -> StepOutput:
        """See `Engine.forward_backward`."""
        self._gradients()
        has_dropout = self.has_dropout
        if has_dropout:
            self._seed.random_(0, 2**31)
        inputs = self._to_device(batch, True, objective.is_weighted_sum)
        if self._graphs is None:
            output = self._pass(inputs, objective)
        else:
            output = self._graphs.run(inputs, objective, (has_dropout, self.has_scales and self._is_stale))
        self._is_stale = False
        return output

    def _pass(self, inputs: Inputs, objective: Objective = LIKELIHOOD, depth: int | None = None) -> StepOutput:
        """Run forward and backward without waiting for the device.

        Args:
            inputs: the batch.
            objective: objective of the pass.
            depth: number of blocks that go backward, from the last; None: all. The first of these hold most memory.
        """
        at = self._context(inputs.documents, training=True)
        cast_all(self._adapters)
        stream, saved = self._forward(inputs.ids_T, at, True)
        losses_N, d_TE = self._head(inputs, stream, True)
        del stream
        about = inputs.weights_N, inputs.index_N, inputs.documents.bounds, inputs.values
        if depth and self.on_gpu:  # what is held until now is measured apart
            self._loss_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        output, coefficients_N = objective(TrainedTokens(-losses_N.double(), *about))
        if coefficients_N is not None:  # backward is linear in the rows of the head's gradient
            factor_N = torch.where(inputs.targets_N >= 0, -coefficients_N, 0.0).float()
            d_TE *= torch.zeros_like(d_TE[:, :1], dtype=torch.float32).index_copy_(0, inputs.index_N, factor_N[:, None])
        for block in self.blocks[: -depth - 1 : -1] if depth else reversed(self.blocks):
            self._weights.enter(block.number, -1)
            if len(saved) > 1:
                saved[-2].fetch(self._store)
            block.backward(d_TE, saved.pop(), at, block.number == 0)
            self._weights.leave(block.number)
        return output

    @torch.no_grad()
    def token_logprobs(self, batch: Batch) -> torch.Tensor:
        """See `Engine.token_logprobs`."""
        return self._logprobs(self._to_device(batch, training=False))

    def _logprobs(self, inputs: Inputs) -> torch.Tensor:
        cast_all(self._adapters)
        stream, _ = self._forward(inputs.ids_T, self._context(inputs.documents, training=False), False)
        return -self._head(inputs, stream, False)[0].double()

    def _to_device(self, batch: Batch, training: bool, by_weight: bool = True) -> Inputs:
        """Move the batch to the device, and make rotary tables for its length."""
        if not self.shares_prompts:
            batch = replace(batch, shared=())
        inputs = Inputs.of(batch, self._device, self.decoder.longest, training and self._pads, by_weight)
        self._rotary(inputs.documents.longest)
        return inputs

    def _context(self, documents: Documents, training: bool) -> Context:
        cos_PS, sin_PS = self._rotary(documents.longest)
        seed = self._seed if training and self.has_dropout else None
        workspace, refreshes = self.placement.workspace_bytes, self._is_stale or not training
        return Context(documents, cos_PS, sin_PS, self._scratch, seed, workspace, self._store, refreshes)

    def _rotary(self, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tables of the model's own rotary module, float32, for documents of up to so many tokens.

        Where it has other angles for long documents, their table follows that of the short ones.
        """
        switch = self.decoder.longest
        if not self._tables or len(self._tables[-1][0]) - (switch or 0) < longest:
            rows = -(-longest // 1024) * 1024
            counts = [rows] if switch is None else [switch, max(rows, switch + 1)]
            parts = [self._angles(count) for count in counts]
            cos_PS, sin_PS = (torch.cat(tables).contiguous() for tables in zip(*parts, strict=True))
            self._tables.append((cos_PS, sin_PS))
        return self._tables[-1]

    def _angles(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.decoder.rotary(self.master.data[:1], torch.arange(rows, device=self._device)[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half], sin[0, :, :half]

    def _forward(self, ids_T: torch.Tensor, at: Context, training: bool) -> tuple[Residual, list[SavedActivations]]:
        """Return the residual stream after the last block, and the saved activations of each block."""
        stream = Residual(self.ends.embed(ids_T))
        saved: list[SavedActivations] = []
        for block, placement in zip(self.blocks, self.placement.blocks, strict=True):
            self._weights.enter(block.number, 1)
            keep, host = (placement.kept, placement.hosted) if training else (frozenset(), frozenset())
            if block is self.blocks[-1]:  # backward needs its tensors at once
                keep, host = keep | host, frozenset()
            stream, of_block = block.forward(stream, at, keep, host)
            self._weights.leave(block.number)
            self._store.release()
            if training:
                saved.append(of_block)
        self._store.release(0)
        return stream, saved

    def _head(self, inputs: Inputs, stream: Residual, training: bool) -> tuple[torch.Tensor, Any]:
        """Return losses of trained tokens, and in training the gradient of the residual stream, with padding."""
        norm, weight_VD = self.decoder.norm, self.ends.head()
        y_TD = torch.empty_like(stream.x_TD)
        x_TD, rstd_T = stream.norm(norm, y_TD)
        D, index_N = x_TD.shape[1], inputs.index_N
        losses_N = torch.empty(len(index_N), dtype=torch.float32, device=self._device)
        padding = max(max(block.o.padding, block.down.padding) for block in self.blocks)
        d_TE = x_TD.new_zeros((len(x_TD), D + padding)) if training else None
        rows = max(16, LOGITS_BYTES // (weight_VD.shape[0] * weight_VD.element_size()) // 16 * 16)
        for start in range(0, len(index_N), rows):
            part = slice(start, start + rows)
            logits_nV = self._logits(y_TD[index_N[part]], weight_VD)
            targets_n, factor_n = inputs.targets_N[part], inputs.factor_N[part]
            softmax_loss(logits_nV, targets_n, factor_n, losses_N[part], self.decoder.head_cap, training)
            if d_TE is not None:
                d_TE[:, :D].index_copy_(0, index_N[part], torch.mm(logits_nV, weight_VD))
            del logits_nV
        if d_TE is not None:
            del y_TD
            rms_norm_backward(d_TE[:, :D], x_TD, norm.weight_D, rstd_T, norm.eps, norm.offset)
        return losses_N, d_TE

    def _logits(self, y_nD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """Return y times the head, in the memory of dequantized weights if that is enough: blocks do not run now."""
        size = len(y_nD) * len(weight_VD)
        if size > len(self._scratch) or self._scratch.dtype != weight_VD.dtype:
            return F.linear(y_nD, weight_VD)
        return torch.mm(y_nD, weight_VD.mT, out=self._scratch[:size].view(len(y_nD), -1))


def _dummy(lengths: Sequence[int], shared: tuple[int, ...] = ()) -> Batch:
    """Return a batch of zeros that trains every token; documents that share tokens are pairs."""
    tokens = sum(lengths)
    ids_T, weights_T = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    return Batch(
        ids_T, ids_T, weights_T, tuple(lengths), tokens, float(tokens),
        documents_per_row=2 if shared else 1, shared=shared,
    )  # fmt: skip
