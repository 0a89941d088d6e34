"""Passes over short prompts, recorded on a GPU: the host takes several times as long to launch one as it to compute it.

A pass is recorded for a number of rows (powers of two) and of tokens (steps of STEP); prompts are padded to them, and
what stands behind a prompt is read by none of its tokens. Its keys and values are copied into one buffer, so that the
recordings share the memory in which they compute, and are taken from there before the next prompts are read. Rows'
adapters are data, as they are in a step.

R rows, T tokens, H heads, D width of a head.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from veneer.evaluation.recordings import Recordings
from veneer.serving.mixed import AdapterBank

STEP = 64
MOST = 1024  # tokens of a pass, with padding; a longer one keeps the GPU busy while the host launches it
EAGER_PASSES = 2  # passes of a shape before it is recorded, in which libraries set themselves up


class RecordedPrompts:
    """Reads short prompts of which nothing is known yet.

    Args:
        model: A Transformers model in evaluation mode, on a GPU.
        bank: The adapters on it.
        like: Cache that holds a token, for heads and widths.
    """

    def __init__(self, model: Any, bank: AdapterBank, like: DynamicCache) -> None:
        self._model, self._bank = model, bank
        keys = like.layers[0].keys
        self._device, self._dtype = keys.device, keys.dtype
        self._like = like
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # by layer, [MOST, H, D] each
        self._ids_N = torch.zeros(MOST, dtype=torch.int64, device=self._device)
        self._adapters_R = torch.zeros(MOST // STEP, dtype=torch.int64, device=self._device)
        self.passes = Recordings(EAGER_PASSES)
        self._version = bank.version

    @staticmethod
    def fits(rows: int, tokens: int) -> bool:
        """Return whether a pass over so many prompts of so many tokens is recorded."""
        rows, tokens = _padded(rows, tokens)
        return rows * tokens <= MOST

    def read(self, ids: Sequence[Sequence[int]], adapters: Sequence[int]) -> Any:
        """Return the keys and values of prompts, which hold until the next ones are read; None: they are too long.

        Args:
            ids: Tokens of each prompt, all padded to one length.
            adapters: Number of each one's adapter.
        """
        if not self.fits(len(ids), len(ids[0])):
            return None
        rows, tokens = _padded(len(ids), len(ids[0]))
        if not self._kept:
            self._kept = [(self._buffer(layer.keys), self._buffer(layer.values)) for layer in self._like.layers]
        if self._version != self._bank.version:
            self.passes.clear()
            self._version = self._bank.version
        padded = [[*some, *[0] * (tokens - len(some))] for some in ids] + [[0] * tokens] * (rows - len(ids))
        data = [token for some in padded for token in some], [*adapters, *[adapters[0]] * (rows - len(ids))]
        for buffer, values in zip((self._ids_N, self._adapters_R), data, strict=True):
            buffer[: len(values)].copy_(torch.tensor(values), non_blocking=True)
        key = rows, tokens, not any(adapters)
        self.passes.run(key, lambda: self._pass(*key))
        return SimpleNamespace(
            layers=[
                SimpleNamespace(keys=self._rows(keys, rows, tokens), values=self._rows(values, rows, tokens))
                for keys, values in self._kept
            ]
        )

    def _pass(self, rows: int, tokens: int, is_base: bool) -> None:
        cache = DynamicCache(config=self._model.config.get_text_config())
        at_T = torch.arange(tokens, device=self._device)
        mask_TT = torch.full((tokens, tokens), torch.finfo(self._dtype).min, dtype=self._dtype, device=self._device)
        with self._bank.device_rows(None if is_base else self._adapters_R[:rows]):
            self._model(
                input_ids=self._ids_N[: rows * tokens].view(rows, tokens),
                position_ids=at_T.expand(rows, tokens),
                attention_mask=mask_TT.triu(1).expand(rows, 1, tokens, tokens),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        for (keys, values), layer in zip(self._kept, cache.layers, strict=True):
            self._rows(keys, rows, tokens).copy_(layer.keys)
            self._rows(values, rows, tokens).copy_(layer.values)

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros((MOST, like.shape[1], like.shape[3]))

    @staticmethod
    def _rows(kept: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
        return kept[: rows * tokens].view(rows, tokens, *kept.shape[1:]).transpose(1, 2)


def _padded(rows: int, tokens: int) -> tuple[int, int]:
    """Return the rows and the tokens of a recorded pass that holds so many."""
    return 1 << (rows - 1).bit_length(), -(-tokens // STEP) * STEP
