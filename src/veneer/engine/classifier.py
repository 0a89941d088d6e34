"""The engine of classifiers: Transformers' model with PEFT's adapters, whose head scores texts.

An example's last token is the id of its label (data/labelled.py). The engine takes it off, pads texts of similar length
on the right, and gives its log-probability among the labels, which is what objectives read.

Shapes: B rows, L padded length, C labels.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch.nn.utils.rnn import pad_sequence

from veneer.data.batch import Batch
from veneer.engine.interface import BatchShapes
from veneer.engine.objective import Objective, StepOutput, TrainedTokens
from veneer.engine.placement import H100, MemoryPlacement, Rates, whole_blocks
from veneer.engine.reference import padded_groups
from veneer.engine.temporary import no_dropout
from veneer.machine.device import return_freed_memory

TRIM_EVERY = 8  # passes between two trims of the heap


class ClassifierEngine:
    """Runs a classifier.

    Args:
        model: PEFT model of a base with a head, or the base alone.
        pad_id: token that fills rows up.
        separator: token behind which the second text of a pair begins, for models that are told so; None: they are not.
    """

    name = "reference"
    is_reference = True
    shares_prompts = False
    master = None

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Self:
        """Make the engine of a model whose texts a tokenizer gives."""
        kinds = getattr(model.config, "type_vocab_size", 0)
        is_told = kinds > 1 and "token_type_ids" in tokenizer.model_input_names
        return cls(model, tokenizer.pad_token_id, tokenizer.sep_token_id if is_told else None)

    def __init__(self, model: Any, pad_id: int, separator: int | None = None) -> None:
        self.model = model
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._pad_id, self._separator = pad_id, separator
        self._device = self._base.get_input_embeddings().weight.device
        self._sum_dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._passes = 0

    def forward_backward(self, batch: Batch, objective: Objective) -> StepOutput:
        """See `Engine.forward_backward`; where coefficients are not known, all rows run forward first."""
        self.model.train()
        logprobs_N, weights_N = self._empty(batch), batch.weights_T[batch.targets_T >= 0]
        waiting: list[tuple[Any, torch.Tensor]] = []
        for which, found in self._of_labels(batch):
            logprobs_N[which] = found.detach().to(self._sum_dtype)
            if objective.is_weighted_sum:
                found.backward(weights_N[which].to(self._device) * -batch.scale)  # type: ignore[no-untyped-call]
            else:
                waiting.append((which, found))
        output, coefficients_N = objective(TrainedTokens.of(batch, logprobs_N))
        if coefficients_N is not None:
            coefficients_N = coefficients_N.float() * batch.scale
            for which, found in waiting:
                found.backward(coefficients_N[which])  # type: ignore[no-untyped-call]
        return output

    @torch.no_grad()
    def token_logprobs(self, batch: Batch) -> torch.Tensor:
        """See `Engine.token_logprobs`: one of each label."""
        self.model.eval()
        logprobs_N = self._empty(batch)
        for which, found in self._of_labels(batch):
            logprobs_N[which] = found.to(self._sum_dtype)
        return logprobs_N

    @torch.no_grad()
    def scores(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the logits of each text's labels, float32 on the host, shape (B, C).

        Args:
            texts: tokens of each text, without a label.
        """
        self.model.eval()
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for rows, logits_BC in self._logits(texts):
            for row, logits_C in zip(rows, logits_BC.float().cpu()):
                found[row] = logits_C
        return torch.stack(found)

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

    def tighten(self) -> None:
        """See `Engine.tighten`: it has no other placement."""
        return None

    def adapter_off(self) -> AbstractContextManager[None]:
        """See `Engine.adapter_off`; the head is then the one that the base was loaded with."""
        found: AbstractContextManager[None] = self.model.disable_adapter()
        return found

    def dropout_off(self) -> AbstractContextManager[None]:
        """See `Engine.dropout_off`."""
        return no_dropout(self.model)

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {"chunked_head": False}

    def _empty(self, batch: Batch) -> torch.Tensor:
        return torch.empty(batch.trained, dtype=self._sum_dtype, device=self._device)

    def _of_labels(self, batch: Batch) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yield log-probabilities of labels, some at a time, with their numbers among the batch's.

        Of a head with one output it is that output, the reward of a text.
        """
        labels_B = batch.targets_T[batch.targets_T >= 0]
        for rows, logits_BC in self._logits(_documents(batch)):
            if logits_BC.shape[1] == 1:
                yield rows, logits_BC[:, 0].float()
                continue
            yield rows, logits_BC.float().log_softmax(1).gather(1, labels_B[rows, None].to(self._device)).squeeze(1)

    def _read(self, outputs: Any, mask_BL: torch.Tensor) -> torch.Tensor:
        """Return what is used of the model's outputs: the logits."""
        logits: torch.Tensor = outputs.logits
        return logits

    def _logits(self, texts: Sequence[torch.Tensor]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield groups of texts of similar length, by number, with what `_read` reads of their outputs."""
        for rows in padded_groups([len(text) for text in texts]):
            ids_BL = pad_sequence([texts[row] for row in rows], batch_first=True, padding_value=self._pad_id)
            lengths_B = torch.tensor([len(texts[row]) for row in rows])
            mask_BL = (torch.arange(ids_BL.shape[1]) < lengths_B[:, None]).long()
            given = {"input_ids": ids_BL, "attention_mask": mask_BL}
            if self._separator is not None:
                ends_BL = (ids_BL == self._separator).cumsum(1) - (ids_BL == self._separator).long()
                given["token_type_ids"] = (ends_BL > 0).long() * mask_BL
            given = {name: part.to(self._device) for name, part in given.items()}
            yield rows, self._read(self.model(**given), given["attention_mask"])
            self._passes += 1
            if self._device.type == "cpu" and self._passes % TRIM_EVERY == 0:
                return_freed_memory()


def _documents(batch: Batch) -> list[torch.Tensor]:
    """Return the tokens of each text of a batch, without its label."""
    return [document[:-1] for document in torch.split(batch.ids_T, list(batch.lengths))]
