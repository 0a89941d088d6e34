"""The engine of token classification: Transformers' model with PEFT's adapters, whose head scores each token.

Behind each token that begins a word an example has the id of the word's tag (data/tagging.py). The engine takes these
out, and gives their log-probabilities among all tags, which is what objectives read.

Shapes: B rows, L padded length, C tags, N trained tags of a batch.
"""

from collections.abc import Iterator, Sequence

import torch

from veneer.data.batch import Batch
from veneer.engine.classifier import ClassifierEngine


class TokenClassifierEngine(ClassifierEngine):
    """Runs a token classifier; arguments are those of `ClassifierEngine`."""

    @torch.no_grad()
    def token_scores(self, texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the logits of each text's tokens, float32 on the host, of shape (length, C) each."""
        self.model.eval()
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for rows, logits_BLC in self._logits(texts):
            for row, logits_LC in zip(rows, logits_BLC.float().cpu()):
                found[row] = logits_LC[: len(texts[row])]
        return found

    def scores(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the logits of all tokens of the texts, one behind the other, float32 on the host."""
        return torch.cat(self.token_scores(texts))

    def _of_labels(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        parts = [torch.split(part, list(batch.lengths)) for part in (batch.ids_T, batch.targets_T)]
        texts, tags, numbers, count = [], [], [], 0
        for ids, targets in zip(*parts):
            is_tag = torch.cat([torch.zeros(1, dtype=torch.bool), targets[:-1] >= 0])
            texts.append(ids[~is_tag])
            tags.append(targets[~is_tag])
            numbers.append(count + torch.arange(int(is_tag.sum())))
            count += len(numbers[-1])
        for rows, logits_BLC in self._logits(texts):
            at = [(tags[row] >= 0).nonzero().squeeze(1) for row in rows]
            row_N = torch.cat([torch.full_like(found, n) for n, found in enumerate(at)]).to(logits_BLC.device)
            column_N = torch.cat(at).to(logits_BLC.device)
            tag_N = torch.cat([tags[row][found] for row, found in zip(rows, at)]).to(logits_BLC.device)
            logprobs_NC = logits_BLC[row_N, column_N].float().log_softmax(1)
            yield torch.cat([numbers[row] for row in rows]), logprobs_NC.gather(1, tag_N[:, None]).squeeze(1)
