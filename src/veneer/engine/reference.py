"""The reference engine runs Transformers' own model with PEFT's own adapters, for any architecture.

Faster engines are compared with it, so it changes nothing: the model's code computes everything up to the last hidden
state. A packed batch is unpacked to right-padded rows, so that no document sees another whatever the attention backend;
rows of similar length are batched, so that padding is little. Padding comes after the tokens, where causal attention
never looks, so no mask is passed, and backends that take none stay available.

Only the head is handled here, because logits of untrained positions are the largest waste of a small step. Whether a
model's head really is one linear layer (some scale or cap their logits) is not assumed but tested on a few tokens;
where it is not, the model computes its own logits. For the CPU, on request, a prefix that rows share is computed once
(prefix.py), attention of short rows takes plain products (attention.py), and adapters beside 16-bit copies of 4-bit
weights are multiplied in 16 bits (model/dense.py); comparisons with other engines do none of it.

Shapes: B rows, L padded length, N trained tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from veneer.data.batch import UNTRAINED, Batch
from veneer.engine.attention import short_row_attention
from veneer.engine.interface import BatchShapes
from veneer.engine.objective import Objective, StepOutput, TrainedTokens
from veneer.engine.placement import H100, MemoryPlacement, Rates, whole_blocks
from veneer.engine.positions import switch_of
from veneer.engine.prefix import can_share, hidden_after_prefix, shared_tokens
from veneer.engine.temporary import no_dropout
from veneer.kernels.linear_cross_entropy import linear_cross_entropy
from veneer.kernels.trained_head import trained_head_cross_entropy
from veneer.machine.device import return_freed_memory
from veneer.model.attach import adapter_off
from veneer.model.dense import adapter_beside_copies
from veneer.model.full import is_full, weights_of

TRIM_EVERY = 8  # passes between two trims of the heap
PADDING = 1.25  # largest ratio of padded to real tokens in a group of rows


@dataclass(frozen=True)
class PaddedRows:
    """Documents of similar length as right-padded rows, with the positions of their trained tokens.

    Attributes:
        order_N: index of each trained token among those of the batch.
        shared: length of a common prefix that is computed once; 0: each row is computed whole.
    """

    shared: int
    ids_BL: torch.Tensor
    row_N: torch.Tensor
    column_N: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor
    order_N: torch.Tensor


class ReferenceEngine:
    """Runs a PEFT model as it is, or one that is trained whole.

    Args:
        model: PEFT model from `veneer.model.attach` or `load_adapter`; a model that is trained whole; to measure losses
            alone, a base without adapter.
        for_cpu: whether to compute a prefix that rows share once, where the model allows it, and attention and adapters
            as is fastest on a CPU.
        load_base: function that loads the base of a model that was trained whole, for `adapter_off`; None: not known.
    """

    name = "reference"
    is_reference = True
    shares_prompts = False
    master = None

    def __init__(self, model: Any, for_cpu: bool = False, load_base: Callable[[], Any] | None = None) -> None:
        self.model = model
        self._one_pass = False
        self._load_base = load_base
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._device = self._base.get_input_embeddings().weight.device
        # Apple's GPU has no float64.
        self._sum_dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self.chunked_head = self._head_is_linear()
        self._switch = switch_of(self._base.config.get_text_config())
        self._for_cpu = for_cpu
        self._passes = 0
        with short_row_attention(self._base, 0 if for_cpu else None):
            self._shares = for_cpu and self.chunked_head and self._switch is None and can_share(self._base)

    def forward_backward(self, batch: Batch, objective: Objective) -> StepOutput:
        """See `Engine.forward_backward`.

        Each group of rows runs backward at once where coefficients are known; else all run forward first.
        """
        self.model.train()
        waiting: list[tuple[PaddedRows, torch.Tensor]] = []

        def go_back(rows: PaddedRows, logprobs_N: torch.Tensor) -> None:
            if objective.is_weighted_sum:
                logprobs_N.backward(rows.weights_N * -batch.scale)  # type: ignore[no-untyped-call]
            else:
                waiting.append((rows, logprobs_N))

        logprobs_N = self._forward(batch, go_back)
        output, coefficients_N = objective(TrainedTokens.of(batch, logprobs_N))
        if coefficients_N is not None:
            coefficients_N = coefficients_N.float() * batch.scale
            while waiting:
                rows, logprobs_N = waiting.pop()
                with self._cpu_passes(rows):
                    logprobs_N.backward(coefficients_N[rows.order_N])  # type: ignore[no-untyped-call]
        return output

    @torch.no_grad()
    def token_logprobs(self, batch: Batch) -> torch.Tensor:
        """See `Engine.token_logprobs`."""
        self.model.eval()
        return self._forward(batch, lambda rows, logprobs_N: None)

    def _forward(self, batch: Batch, go_back: Callable[[PaddedRows, torch.Tensor], None]) -> torch.Tensor:
        """Return log-probabilities in the batch's order; `go_back` is called with those of each group of rows first."""
        trained = int((batch.targets_T >= 0).sum())
        found_N = torch.empty(trained, dtype=self._sum_dtype, device=self._device)
        for rows in _rows(batch, self._device, self._switch, self._shares, self._one_pass):
            with self._cpu_passes(rows):
                logprobs_N = token_logprobs(self._base, rows, self.chunked_head)
                go_back(rows, logprobs_N)
            found_N[rows.order_N] = logprobs_N.detach().to(self._sum_dtype)
            del logprobs_N
            self._trim()
        return found_N

    def plan_memory(
        self,
        shapes: BatchShapes,
        gradient_checkpointing: bool | str,
        later_bytes: int,
        budget_bytes: int | None = None,
        rates: Rates = H100,
    ) -> MemoryPlacement:
        """See `Engine.plan_memory`; Transformers follows the setting."""
        return whole_blocks(self._base.config.get_text_config().num_hidden_layers, gradient_checkpointing)

    def run_in_one_pass(self) -> bool:
        """Pad all rows of a batch alike from now on, so that one backward gives each weight its whole gradient.

        Returns:
            Whether it does; not where rows must lie on one side of a length at which the model changes.
        """
        self._one_pass = self._switch is None
        return self._one_pass

    def tighten(self) -> None:
        """See `Engine.tighten`: it has no other placement."""
        return None

    def adapter_off(self) -> AbstractContextManager[None]:
        """See `Engine.adapter_off`."""
        if is_full(self.model):
            assert self._load_base is not None, "the base of a model that was trained whole"
            return weights_of(self.model, self._load_base)
        return adapter_off(self.model)

    def dropout_off(self) -> AbstractContextManager[None]:
        """See `Engine.dropout_off`."""
        return no_dropout(self.model)

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {"chunked_head": self.chunked_head}

    @contextmanager
    def _cpu_passes(self, rows: PaddedRows) -> Iterator[None]:
        """Within the context, rows are computed as is fastest on a CPU, if the engine was built for it."""
        if not self._for_cpu:
            yield
            return
        with short_row_attention(self._base, rows.ids_BL.shape[1]), adapter_beside_copies(self.model):
            yield

    def _trim(self) -> None:
        self._passes += 1
        if self._device.type == "cpu" and self._passes % TRIM_EVERY == 0:
            return_freed_memory()

    @torch.no_grad()
    def _head_is_linear(self) -> bool:
        """Return whether head(last hidden state) equals the model's logits on eight tokens."""
        head = self._base.get_output_embeddings()
        if type(head) is not torch.nn.Linear or self._base.base_model is self._base:
            return False
        self.model.eval()
        ids_BL = torch.arange(8, device=self._device)[None] % head.weight.shape[0]
        logits_BLV = self._base(input_ids=ids_BL, use_cache=False).logits
        return torch.equal(head(_hidden(self._base, ids_BL)).float(), logits_BLV.float())


def token_logprobs(base: Any, rows: PaddedRows, chunked_head: bool) -> torch.Tensor:
    """Return the log-probability of every trained token, float32, shape (N,).

    Args:
        base: Transformers' model, with or without adapters in it.
        rows: the micro-batch.
        chunked_head: whether the head is one linear layer, so that logits can be computed a chunk at a time.
    """
    if chunked_head:
        head = base.get_output_embeddings()
        hidden_BLD = hidden_after_prefix(base, rows.ids_BL, rows.shared) if rows.shared else _hidden(base, rows.ids_BL)
        hidden_ND = hidden_BLD[rows.row_N, rows.column_N - rows.shared]
        trains_head = head.weight.requires_grad and torch.is_grad_enabled()
        of_head = trained_head_cross_entropy if trains_head else linear_cross_entropy
        losses_N = of_head(hidden_ND, head.weight, head.bias, rows.targets_N)
    else:
        logits_BLV = base(input_ids=rows.ids_BL, use_cache=False).logits
        logits_NV = logits_BLV[rows.row_N, rows.column_N].float()
        losses_N = F.cross_entropy(logits_NV, rows.targets_N, reduction="none")
    return -losses_N


def _hidden(base: Any, ids_BL: torch.Tensor) -> torch.Tensor:
    hidden_BLD: torch.Tensor = base.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
    return hidden_BLD


def _rows(
    batch: Batch, device: torch.device, switch: int | None, share: bool = False, one_pass: bool = False
) -> list[PaddedRows]:
    """Return a packed batch as groups of right-padded rows, or as a single one."""
    order_T = (batch.targets_T >= 0).cumsum(0) - 1
    parts = [torch.split(t, list(batch.lengths)) for t in (batch.ids_T, batch.targets_T, batch.weights_T, order_T)]
    groups = [list(range(len(batch.lengths)))] if one_pass else padded_groups(batch.lengths, switch)
    return [_pad([[part[document] for document in group] for part in parts], device, share) for group in groups]


def padded_groups(lengths: Sequence[int], switch: int | None = None) -> list[list[int]]:
    """Group documents of similar length, the longest first.

    Args:
        lengths: tokens of each.
        switch: length beyond which rotary angles differ; a group must lie on one side of it.
    """
    groups: list[list[int]] = []
    real = 0
    for document in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length = lengths[document]
        if groups and (switch is None or length > switch or lengths[groups[-1][0]] <= switch):
            padded = lengths[groups[-1][0]] * (len(groups[-1]) + 1)
            if padded <= PADDING * (real + length):
                groups[-1].append(document)
                real += length
                continue
        groups.append([document])
        real = length
    return groups


def _pad(parts: list[list[torch.Tensor]], device: torch.device, share: bool) -> PaddedRows:
    paddings = (0, UNTRAINED, 0, 0)
    ids_BL, targets_BL, weights_BL, order_BL = (
        pad_sequence(part, batch_first=True, padding_value=padding) for part, padding in zip(parts, paddings)
    )
    row_N, column_N = at_N = (targets_BL != UNTRAINED).nonzero(as_tuple=True)
    # Rows without trained tokens have no loss to compute, shared or not.
    shared = shared_tokens(ids_BL, int(column_N.min())) if share and len(column_N) else 0
    tensors = ids_BL, row_N, column_N, targets_BL[at_N], weights_BL[at_N], order_BL[at_N]
    return PaddedRows(shared, *(t.to(device) for t in tensors))
