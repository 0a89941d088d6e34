"""Answers in slots (continuous batching): a row that has ended makes room for the next prompt at once.

Every step is a token for each slot, through the model's own forward pass, and all that a step changes lies in tensors
of fixed places. So a step's products have one shape from the first token to the last, an answer does not depend on what
stands in the slots beside it, and on a GPU the pass is recorded as a CUDA graph: a step's thousands of launches would
take longer than its work. Which rows have ended is read only every few steps there, so that the GPU never waits for it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from veneer.evaluation.prefill import ReadPrompt
from veneer.evaluation.recordings import Recordings
from veneer.evaluation.slot_attention import attends_slots, reads_own_keys, slot_mask
from veneer.evaluation.slot_cache import SlotCache, SlotView
from veneer.planning.held_out import slot_length

GRAPH_WIDTH = 256  # positions of the shortest recorded step; longer ones double
EAGER_STEPS = 3  # steps of a width before it is recorded: libraries set themselves up, short answers need no graph
STEPS = 8  # between two looks at which rows have ended, on a GPU


class Row(NamedTuple):
    """What is to be answered.

    Attributes:
        prompt: Token ids.
        limit: Most tokens of the answer.
        draws: A uniform number for each token; None: greedy.
    """

    prompt: list[int]
    limit: int
    draws: torch.Tensor | None


class SlotDecoder:
    """Generates answers in slots.

    Args:
        model: A Transformers or PEFT model that `has_slots` admits, in evaluation mode.
        rows: All rows, which the buffers are made for.
        slots: Number of slots.
        stop_ids: Tokens that end an answer.
        choose: Function of logits [S, V] and uniform numbers [S] (None: greedy) to tokens [S].
        is_ended: Function that says of an answer's tokens whether a stop text ends it; None: there are none.
        graphs: Whether to record steps on a GPU.

    Attributes:
        steps: Steps taken.
        recorded: Recorded passes, by the positions that attention may read.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Row],
        slots: int,
        stop_ids: Sequence[int],
        choose: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        is_ended: Callable[[list[int]], bool] | None = None,
        graphs: bool = True,
    ) -> None:
        device = model.get_input_embeddings().weight.device
        self._model, self._rows, self._choose, self._is_ended = model, rows, choose, is_ended
        longest = max(row.limit for row in rows)
        length = max(len(row.prompt) + row.limit for row in rows)
        self._length = slot_length(length)
        # For each slot: its token, that token's position, whether it answers, tokens generated, and their limit.
        self._state_5S = torch.zeros((5, slots), dtype=torch.int64, device=device)
        self._token_S, position_S, self._active_S, self._count_S, self._limit_S = self._state_5S.unbind()
        self._answer_SN = torch.zeros((slots, longest + 1), dtype=torch.int64, device=device)
        sampled = any(row.draws is not None for row in rows)
        self._draw_SN = torch.zeros((slots, longest + 1), device=device) if sampled else None
        self._stop = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self._view = SlotView(position_S)
        self._cache: SlotCache | None = None
        self._busy: dict[int, int] = {}  # slots that answer, and the number of what
        self._counts = [0] * slots  # tokens generated; an answer that has ended since the last look counts on
        self._window = STEPS if device.type == "cuda" else 1
        self.recorded = Recordings(EAGER_STEPS)
        self.steps = 0
        self._reads_own_keys = reads_own_keys(model)
        self._records = graphs and device.type == "cuda" and can_record(model, device)

    def answers(self, read: Iterator[ReadPrompt]) -> Iterator[dict[int, list[int]]]:
        """Yield answers as they end, by number: tokens up to and with the one that ends each."""
        while self._admit(read):
            left = max(self._rows[number].limit - self._counts[slot] for slot, number in self._busy.items())
            for _ in range(min(self._window, left)):
                self._step()
            if ended := self._ended():
                yield ended

    def _admit(self, read: Iterator[ReadPrompt]) -> bool:
        """Fill free slots; return whether any is in use."""
        for slot in range(len(self._counts)):
            if slot not in self._busy and not self._fill(slot, read):
                break
        return bool(self._busy)

    def _fill(self, slot: int, read: Iterator[ReadPrompt]) -> bool:
        """Begin the next prompt's answer in a slot; return whether there was one."""
        if (prompt := next(read, None)) is None:
            return False
        row = self._rows[prompt.number]
        if self._cache is None:
            self._cache = SlotCache(prompt.cache, self._length, self._view)
        start = len(row.prompt) - 1
        self._cache.admit(slot, prompt.cache, prompt.row, start)
        self._state_5S[:, slot] = torch.tensor([row.prompt[-1], start, 1, 0, row.limit])
        if self._draw_SN is not None and row.draws is not None:
            self._draw_SN[slot, : row.limit] = row.draws.to(self._draw_SN.device)
        self._busy[slot], self._counts[slot] = prompt.number, 0
        return True

    def _step(self) -> None:
        """Generate a token in each slot."""
        self.steps += 1
        self._view.seen = max(len(self._rows[n].prompt) - 1 + self._counts[slot] for slot, n in self._busy.items())
        logits_SV = self._logits(self._width(self._view.seen + 1))
        count_S1 = self._count_S[:, None]
        token_S = self._choose(logits_SV, None if self._draw_SN is None else self._draw_SN.gather(1, count_S1)[:, 0])
        self._answer_SN.scatter_(1, count_S1, token_S[:, None])
        was_active_S = self._active_S.clone()
        self._token_S.copy_(torch.where(was_active_S > 0, token_S, self._token_S))
        self._count_S += was_active_S
        self._view.position_S += was_active_S
        self._active_S.mul_(~torch.isin(token_S, self._stop) & (self._count_S < self._limit_S))
        for slot in self._busy:
            self._counts[slot] += 1

    def _width(self, needed: int) -> int:
        """Return the positions that attention may read: few different numbers where each is recorded."""
        if self._reads_own_keys:
            return self._length
        width = slot_length(needed)
        if self._records:
            width = GRAPH_WIDTH
            while width < needed:
                width *= 2
        return min(width, self._length)

    def _logits(self, width: int) -> torch.Tensor:
        """Return logits [S, V] of the slots' tokens; what was returned before is overwritten."""
        self._view.width = width
        return self.recorded.run(width, self._forward) if self._records else self._forward()

    def _forward(self) -> torch.Tensor:
        assert self._cache is not None
        with attends_slots(self._model):
            output = self._model(
                input_ids=self._token_S[:, None],
                position_ids=self._view.position_S[:, None],
                attention_mask=slot_mask(self._model, self._view, self._cache.layers[0].keys.dtype),
                past_key_values=self._cache,
                use_cache=True,
            )
        logits_SV: torch.Tensor = output.logits[:, -1]
        return logits_SV

    def _ended(self) -> dict[int, list[int]]:
        """Free the slots whose answers have ended, and return these."""
        active, counts = torch.stack((self._active_S, self._count_S)).tolist()
        ended = {}
        for slot, number in list(self._busy.items()):
            looked_at = self._counts[slot] - self._window
            self._counts[slot] = count = counts[slot]
            cut = self._stop_text(slot, looked_at, count)
            if cut is None and active[slot]:
                continue
            ended[number] = self._answer_SN[slot, : cut or count].tolist()
            self._active_S[slot] = 0
            del self._busy[slot]
        return ended

    def _stop_text(self, slot: int, looked_at: int, count: int) -> int | None:
        """Return the tokens after which a slot's answer holds a stop text; None: it holds none."""
        if self._is_ended is None:
            return None
        ids = self._answer_SN[slot, :count].tolist()
        return next((n for n in range(max(1, looked_at), count + 1) if self._is_ended(ids[:n])), None)


def can_record(model: Any, device: torch.device) -> bool:
    """Return whether a step is the same launches each time: experts may be chosen on the host, weights streamed."""
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    has_experts = any(getattr(config, name, None) for name in names)
    return not has_experts and all(parameter.device == device for parameter in model.parameters())
