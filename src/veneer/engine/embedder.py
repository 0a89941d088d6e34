"""The engine of embeddings: Transformers' model with PEFT's adapters, whose last hidden states are pooled.

A row's anchor is to be nearer to its positive text than to every other text of the optimizer step: the loss is the
cross-entropy of its cosine similarities, divided by a temperature (InfoNCE: arXiv 1807.03748; with the other rows'
texts as negatives: arXiv 1705.00652). Texts that equal the positive or the anchor are no negatives.

So the loss of a micro-batch depends on the others. Where a step has several, all of its texts are embedded first
without gradients, the loss's gradient by each embedding is computed, and then each micro-batch is run again and given
its own part of it (arXiv 2101.06983). However a step is cut, its gradient is the same but for dropout, whose masks are
drawn again alike for a micro-batch that comes back as it was.

Shapes: B texts, L padded length, D embedding, R rows, A texts of all rows.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from veneer.data.batch import Batch
from veneer.data.texts import split_texts
from veneer.engine.classifier import ClassifierEngine
from veneer.engine.objective import Objective, StepOutput, TrainedTokens
from veneer.machine.device import rng_state, set_rng_state


class Texts(NamedTuple):
    """The texts of rows.

    Attributes:
        ids: tokens of each text, those of a row one behind the other.
        first_R: number of each row's anchor; its positive comes next.
    """

    ids: list[torch.Tensor]
    first_R: torch.Tensor

    @staticmethod
    def of(batches: Sequence[Batch]) -> "Texts":
        """Take the texts out of the rows of batches."""
        rows = [split_texts(row) for batch in batches for row in torch.split(batch.ids_T, list(batch.lengths))]
        counts = torch.tensor([len(row) for row in rows])
        return Texts([text for row in rows for text in row], counts.cumsum(0) - counts)


class EmbeddingEngine(ClassifierEngine):
    """Runs a model that embeds texts; arguments are those of `ClassifierEngine`.

    Attributes:
        pooling: part of the hidden states that is a text's embedding: mean, cls or last.
        temperature: divisor of cosine similarities.
    """

    pooling = "mean"
    temperature = 0.05

    def __init__(self, model: Any, pad_id: int, separator: int | None = None) -> None:
        super().__init__(model, pad_id, separator)
        self._parts: dict[bytes, _Part] = {}

    def begin_step(self, batches: Iterable[Batch]) -> None:
        """Embed all texts of a step, and keep the loss's gradient by them for its micro-batches.

        Args:
            batches: micro-batches that are run next. They are gone through again for their passes, so that whoever
                yields them knows which one is running.
        """
        self._parts.clear()
        whole = list(batches)
        if len(whole) < 2:
            return
        self.model.train()
        states, found = [], []
        for batch in batches:
            states.append(rng_state())
            with torch.no_grad():
                found.append(self._embed(Texts.of([batch]).ids))
        after = rng_state()
        embeddings_AD = torch.cat(found).requires_grad_()
        logprobs_R = in_batch_logprobs(Texts.of(whole), embeddings_AD, self.temperature)
        (gradient_AD,) = torch.autograd.grad(logprobs_R.sum(), embeddings_AD)
        sizes = [len(part) for part in found]
        parts = zip(torch.split(gradient_AD, sizes), torch.split(logprobs_R.detach(), [len(b.lengths) for b in whole]))
        for batch, state, (gradient, logprobs) in zip(whole, states, parts, strict=True):
            self._parts[_key(batch)] = _Part(gradient, logprobs, state)
        set_rng_state(after)

    def forward_backward(self, batch: Batch, objective: Objective) -> StepOutput:
        """See `Engine.forward_backward`: minus the log-probability of each row's positive text."""
        self.model.train()
        texts, part = Texts.of([batch]), self._parts.get(_key(batch))
        if part is None:
            embeddings_AD = self._embed(texts.ids)
            logprobs_R = in_batch_logprobs(texts, embeddings_AD, self.temperature)
            (-logprobs_R.sum() * batch.scale).backward()  # type: ignore[no-untyped-call]
        else:
            set_rng_state(part.state)
            logprobs_R = part.logprobs_R
            self._embed(texts.ids).backward(part.gradient_AD * -batch.scale)  # type: ignore[no-untyped-call]
        output, _ = objective(TrainedTokens.of(batch, logprobs_R.detach().to(self._sum_dtype)))
        return output

    @torch.no_grad()
    def token_logprobs(self, batch: Batch) -> torch.Tensor:
        """See `Engine.token_logprobs`: one of each row, its positive text's among all texts of the batch."""
        self.model.eval()
        texts = Texts.of([batch])
        return in_batch_logprobs(texts, self._embed(texts.ids), self.temperature).to(self._sum_dtype)

    @torch.no_grad()
    def scores(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the embedding of each text, of length 1, float32 on the host, shape (B, D)."""
        self.model.eval()
        return self._embed(texts).cpu()

    def _embed(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        order, found = [], []
        for rows, embeddings_BD in self._logits(texts):
            order += rows
            found.append(embeddings_BD)
        back = torch.tensor(order).argsort()
        return torch.cat(found)[back.to(self._device)]

    def _read(self, outputs: Any, mask_BL: torch.Tensor) -> torch.Tensor:
        return pool(outputs.last_hidden_state, mask_BL, self.pooling)


class _Part(NamedTuple):
    """What a micro-batch takes from its step: gradient by its embeddings, log-probabilities, RNG before its pass."""

    gradient_AD: torch.Tensor
    logprobs_R: torch.Tensor
    state: Any


def pool(hidden_BLD: torch.Tensor, mask_BL: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return one embedding of length 1 a text, float32: the mean of its hidden states, the first or the last one."""
    hidden_BLD = hidden_BLD.float()
    if pooling == "mean":
        found_BD = (hidden_BLD * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
    elif pooling == "cls":
        found_BD = hidden_BLD[:, 0]
    else:
        found_BD = hidden_BLD[torch.arange(len(hidden_BLD), device=hidden_BLD.device), mask_BL.sum(1) - 1]
    return F.normalize(found_BD, dim=1)


def in_batch_logprobs(texts: Texts, embeddings_AD: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the log-probability of each row's positive text among all texts that are no anchors; (R,)."""
    anchor_R = texts.first_R.to(embeddings_AD.device)
    is_anchor = torch.zeros(len(texts.ids), dtype=torch.bool, device=embeddings_AD.device)
    is_anchor[anchor_R] = True
    numbers: dict[bytes, int] = {}
    same = [numbers.setdefault(text.numpy().tobytes(), len(numbers)) for text in texts.ids]
    same_A = torch.tensor(same, device=embeddings_AD.device)
    equal_RA = (same_A == same_A[anchor_R + 1, None]) | (same_A == same_A[anchor_R, None])
    equal_RA[torch.arange(len(anchor_R), device=equal_RA.device), anchor_R + 1] = False
    scores_RA = embeddings_AD[anchor_R] @ embeddings_AD.T / temperature
    scores_RA = scores_RA.masked_fill(equal_RA | is_anchor, -torch.inf)
    return scores_RA.log_softmax(1).gather(1, (anchor_R + 1)[:, None]).squeeze(1)


def _key(batch: Batch) -> bytes:
    return batch.ids_T.numpy().tobytes()
