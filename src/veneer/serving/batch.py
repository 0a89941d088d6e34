"""All answers that are made at a time: their keys and values, the reading of prompts, and a token for each.

`SlotBatch` keeps each answer in a slot of one buffer (evaluation/slot_cache.py), so that a step is one pass over all
rows. The rows in use are the first slots always: what leaves is replaced by the last one. On a GPU a step of so many
rows (powers of two) is recorded as a CUDA graph, with the numbers of the rows' adapters among its inputs; where
attention reads a common width, of so many positions as well.
Buffers grow as more and longer answers are admitted, up to a number of tokens.

Prompts are read without their last token, which is a row's first step; so all tokens are chosen from logits of one
kind. Several short prompts are read together, and a long one in chunks, so that answers go on meanwhile.

`SingleBatch` is for models whose caches cannot be shared so: each answer has Transformers' own cache, and a step is a
pass for each. S slots.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicCache

from veneer.evaluation.recordings import Recordings
from veneer.evaluation.slot_attention import attends_slots, reads_own_keys, slot_mask
from veneer.evaluation.slot_cache import SlotCache, SlotLayer, SlotView, has_slots
from veneer.evaluation.slots import can_record
from veneer.planning.held_out import slot_length
from veneer.serving.generation import Generation
from veneer.serving.mixed import AdapterBank
from veneer.serving.prefix_cache import BLOCK, PrefixCache
from veneer.serving.recorded_prompts import RecordedPrompts

SHORTEST = 256  # positions of the smallest buffer
CHUNK = {"cuda": 2048, "cpu": 512}  # tokens that are read between two steps
TOGETHER = 8  # prompts that are read at a time
EAGER_STEPS = 3  # steps of a shape before it is recorded


class Reading(Protocol):
    """Prompts that are being read."""

    generations: list[Generation]

    def advance(self) -> bool:
        """Read a chunk; return whether the prompts have been read, so that their rows have joined the batch."""


class Batch(Protocol):
    """Answers that are made at a time.

    Attributes:
        rows: The answers, in the order of the logits.
        most_tokens: Tokens that one prompt and its answer may have at most.
        reads_together: Whether several prompts are read in one pass.
    """

    rows: list[Generation]
    most_tokens: int
    reads_together: bool

    def fits(self, coming: Sequence[Generation]) -> bool:
        """Return whether there is room for these beside the rows."""

    def begin(self, waiting: Sequence[Generation]) -> Reading:
        """Begin to read the first of the waiting prompts, and others that are read well together with it."""

    def step(self) -> torch.Tensor:
        """Read each row's last token; return logits [rows, V], which hold until the next step."""

    def remove(self, row: Generation) -> None:
        """Let a row go."""


def make_batch(model: Any, bank: AdapterBank, slots: int, tokens: int, positions: int, prefix: PrefixCache) -> Batch:
    """Return the batch for a model.

    Args:
        model: A Transformers or PEFT model, in evaluation mode.
        bank: The adapters on it.
        slots: Most answers at a time.
        tokens: Most tokens of keys and values at a time.
        positions: Positions of the model.
        prefix: Keys and values of prompts that were read before.
    """
    if has_slots(model):
        return SlotBatch(model, bank, slots, tokens, positions, prefix)
    return SingleBatch(model, bank, slots, tokens, positions)


def power_of_2(number: int) -> int:
    """Return the smallest power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()


class SlotBatch:
    """A batch in slots; see the module. Arguments of `make_batch`."""

    reads_together = True

    def __init__(
        self, model: Any, bank: AdapterBank, slots: int, tokens: int, positions: int, prefix: PrefixCache
    ) -> None:
        self._model, self._bank, self._most_slots, self._tokens = model, bank, slots, tokens
        self._prefix = prefix
        self.most_tokens = min(positions, tokens)
        self.rows: list[Generation] = []
        self._device: torch.device = model.get_input_embeddings().weight.device
        self._reading: list[Generation] = []
        self._reads_own_keys = reads_own_keys(model)
        self._like = self._new_cache()
        with torch.no_grad(), bank.rows([0], 1):
            self._forward_prompt([[0]], self._like)
        # Of each slot: its token, the token's position, and its adapter.
        self._state_3S = torch.zeros((3, slots), dtype=torch.int64, device=self._device)
        self._slots, self._length = 0, 0
        self._cache: SlotCache | None = None
        self._firsts: dict[int, tuple[SlotCache, SlotView]] = {}
        # By rows, positions, and whether all rows are the base's.
        self.recorded_steps = Recordings(EAGER_STEPS)
        self._version = bank.version
        self.recorded_prompts = None
        is_sdpa = model.config.get_text_config()._attn_implementation == "sdpa"
        if self._device.type == "cuda" and is_sdpa and can_record(model, self._device):
            self.recorded_prompts = RecordedPrompts(model, bank, self._like)

    def fits(self, coming: Sequence[Generation]) -> bool:
        rows = [*self.rows, *self._reading, *coming]
        if len(rows) > self._most_slots:
            return False
        length = slot_length(max(row.most_tokens for row in rows))
        return len(rows) == 1 or min(power_of_2(len(rows)), self._most_slots) * length <= self._tokens

    def begin(self, waiting: Sequence[Generation]) -> "SlotReading":
        chunk = CHUNK.get(self._device.type, CHUNK["cpu"])
        found = [self._prefix.find(row.cache_key, row.prompt) for row in waiting[:TOGETHER]]
        group = [0]
        for number in range(1, len(found)):
            longest = max(len(waiting[n].prompt) - BLOCK * len(found[n]) for n in [*group, number])
            joins = len(found[number]) == len(found[0]) and longest * (len(group) + 1) <= chunk
            if self.recorded_prompts is not None and not found[0]:  # together only where that pass is recorded
                joins = joins and self.recorded_prompts.fits(len(group) + 1, longest - 1)
            if joins and self.fits([waiting[n] for n in [*group, number]]):
                group.append(number)
        generations = [waiting[n] for n in group]
        self._reading = generations
        return SlotReading(self, generations, [found[n] for n in group], chunk)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        rows = self._rows_of_a_step()
        padding = [0] * (rows - len(self.rows))
        state = [
            [row.last_token for row in self.rows] + padding,
            [row.position for row in self.rows] + padding,
            [row.adapter for row in self.rows] + padding,
        ]
        self._state_3S[:, :rows] = torch.tensor(state).to(self._device, non_blocking=True)
        seen = max(state[1])
        width = slot_length(seen + 1)
        if self._device.type == "cuda":
            width = max(SHORTEST, power_of_2(width))
        width = self._length if self._reads_own_keys else min(width, self._length)
        cache, view = self._first(rows)
        view.seen, view.width = seen, width
        if self._device.type == "cuda":
            logits_SV = self._recorded(rows, width, not any(state[2]))
        else:
            with self._bank.rows(state[2], 1):
                logits_SV = self._forward(cache, view, rows)
        return logits_SV[: len(self.rows)]

    def remove(self, row: Generation) -> None:
        slot = self.rows.index(row)
        last = self.rows.pop()
        if last is row:
            return
        self.rows[slot] = last
        held = last.position + 1  # the token there may have been read in this step already
        assert self._cache is not None
        for layer in self._cache.layers:
            for part in (layer.keys, layer.values):
                part[slot, :, :held] = part[len(self.rows), :, :held]

    def join(self, generations: Sequence[Generation], caches: Sequence[tuple[DynamicCache, int]]) -> None:
        """Take rows whose prompts have been read: caches, each with the row of it that holds a prompt's tokens."""
        self._reading = []
        held = [row for row in generations if not row.is_over]
        for row, (cache, number) in zip(generations, caches, strict=True):
            if row.is_over:
                continue
            if len(row.prompt) > BLOCK:  # of a prompt of one token nothing was read
                pairs = [(layer.keys[number], layer.values[number]) for layer in cache.layers]
                self._prefix.keep(row.cache_key, row.prompt, pairs, row.cached // BLOCK)
        if not held:
            return
        self._make_room(len(self.rows) + len(held), max(row.most_tokens for row in [*self.rows, *held]))
        assert self._cache is not None
        for row, (cache, number) in zip(generations, caches, strict=True):
            if row.is_over:
                continue
            if len(row.prompt) > 1:
                self._cache.admit(len(self.rows), cache, number, len(row.prompt) - 1)
            self.rows.append(row)

    def _rows_of_a_step(self) -> int:
        if self._device.type != "cuda":
            return len(self.rows)
        return min(power_of_2(len(self.rows)), self._slots)

    def _first(self, rows: int) -> tuple[SlotCache, SlotView]:
        """Return the cache of the first slots, and their positions."""
        assert self._cache is not None
        if rows not in self._firsts:
            view = SlotView(self._state_3S[1, :rows])
            self._firsts[rows] = self._cache.first(view), view
        return self._firsts[rows]

    def _make_room(self, rows: int, tokens: int) -> None:
        """Grow the buffers, where they are too small, for so many rows of so many tokens."""
        slots = min(max(power_of_2(rows), self._slots), max(rows, self._most_slots))
        length = max(slot_length(tokens), self._length)
        larger = max(SHORTEST, power_of_2(length))
        if slots * larger <= self._tokens:
            length = min(larger, slot_length(self.most_tokens))
        elif slots * length > self._tokens:  # what is held is longer or wider than what is needed now
            slots, length = min(power_of_2(rows), max(rows, self._most_slots)), slot_length(tokens)
        if slots == self._slots and length == self._length:
            return
        if len(self.recorded_steps):
            torch.cuda.synchronize(self._device)  # the last step may be under way in one of them
        view = SlotView(torch.zeros(slots, dtype=torch.int64, device=self._device))
        grown = SlotCache(self._like, 1, view)
        before = [] if self._cache is None else list(self._cache.layers)
        self.recorded_steps.clear()
        self._firsts.clear()
        self._cache = None
        used, held = len(self.rows), max((row.position + 1 for row in self.rows), default=0)
        for number, like in enumerate(self._like.layers):
            grown.layers[number] = layer = SlotLayer(like, length, view)
            if used:
                layer.keys[:used, :, :held] = before[number].keys[:used, :, :held]
                layer.values[:used, :, :held] = before[number].values[:used, :, :held]
                before[number] = None  # one layer at a time is there twice
        self._cache, self._slots, self._length = grown, slots, length

    def _recorded(self, rows: int, width: int, is_base: bool) -> torch.Tensor:
        """Return the logits of a step, which is recorded once libraries have set themselves up for its shapes."""
        if self._version != self._bank.version:
            self.recorded_steps.clear()
            self._version = self._bank.version
        return self.recorded_steps.run((rows, width, is_base), lambda: self._launched(rows, is_base))

    def _launched(self, rows: int, is_base: bool) -> torch.Tensor:
        """Return the logits of a step whose launches are the same whatever adapters its rows have."""
        cache, view = self._first(rows)
        with self._bank.device_rows(None if is_base else self._state_3S[2, :rows]):
            return self._forward(cache, view, rows)

    def _forward(self, cache: SlotCache, view: SlotView, rows: int) -> torch.Tensor:
        with attends_slots(self._model):
            output = self._model(
                input_ids=self._state_3S[0, :rows, None],
                position_ids=self._state_3S[1, :rows, None],
                attention_mask=slot_mask(self._model, view, cache.layers[0].keys.dtype),
                past_key_values=cache,
                use_cache=True,
            )
        logits_SV: torch.Tensor = output.logits[:, -1]
        return logits_SV

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config.get_text_config())

    def _forward_prompt(self, ids: list[list[int]], cache: DynamicCache) -> None:
        ids_BT = torch.tensor(ids).to(self._device, non_blocking=True)  # no wait for the step that is computed
        self._model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)


class SlotReading:
    """Prompts that are read together: all of the same number of blocks that are known.

    Args:
        batch: The batch that they join.
        generations: Answers whose prompts they are.
        blocks: Known blocks of each.
        chunk: Tokens of a row that are read at a time.
    """

    def __init__(self, batch: SlotBatch, generations: list[Generation], blocks: list[Any], chunk: int) -> None:
        self.generations, self._batch, self._chunk = generations, batch, chunk
        self._cache: Any = batch._new_cache()
        known = BLOCK * len(blocks[0])
        for row in generations:
            row.cached = known
        held = [[block.layers() for block in some] for some in blocks]
        for number in range(len(batch._like.layers) if known else 0):
            for_layer = [[layers[number] for layers in some] for some in held]
            keys, values = (
                torch.stack([torch.cat([pair[half] for pair in pairs], dim=1) for pairs in for_layer])
                for half in range(2)
            )
            self._cache.update(keys, values, number)
        own = [row.prompt[known:-1] for row in generations]
        self._width = max(map(len, own))
        self._ids = [ids + [0] * (self._width - len(ids)) for ids in own]
        self._at = 0

    @torch.no_grad()
    def advance(self) -> bool:
        """Read a chunk; return whether all is read."""
        if self._at < self._width and not all(row.is_over for row in self.generations):
            part = [ids[self._at : self._at + self._chunk] for ids in self._ids]
            adapters = [row.adapter for row in self.generations]
            recorded = self._batch.recorded_prompts
            read = None
            if recorded is not None and len(part[0]) == self._width and not self.generations[0].cached:
                read = recorded.read(part, adapters)
            if read is None:
                with self._batch._bank.rows(adapters, len(part[0])):
                    self._batch._forward_prompt(part, self._cache)
            else:
                self._cache = read
            self._at += len(part[0])
            if self._at < self._width:
                return False
        self._batch.join(self.generations, [(self._cache, row) for row in range(len(self.generations))])
        return True


class SingleBatch:
    """A batch of rows that are computed one by one; see the module. Arguments of `make_batch`."""

    reads_together = False

    def __init__(self, model: Any, bank: AdapterBank, slots: int, tokens: int, positions: int) -> None:
        self._model, self._bank, self._most_rows, self._tokens = model, bank, slots, tokens
        self.most_tokens = min(positions, tokens)
        self.rows: list[Generation] = []
        self._caches: dict[Generation, Any] = {}
        self._reading: list[Generation] = []

    def fits(self, coming: Sequence[Generation]) -> bool:
        rows = [*self.rows, *self._reading, *coming]
        return len(rows) <= self._most_rows and (len(rows) == 1 or sum(row.most_tokens for row in rows) <= self._tokens)

    def begin(self, waiting: Sequence[Generation]) -> "SingleReading":
        self._reading.append(waiting[0])
        return SingleReading(self, waiting[0])

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        return torch.cat([self._read(row, [row.last_token]) for row in self.rows])

    def remove(self, row: Generation) -> None:
        self.rows.remove(row)
        self._caches.pop(row, None)

    def join(self, row: Generation) -> None:
        """Take a row whose prompt, but for its last token, has been read."""
        self._reading.remove(row)
        if row.is_over:
            self._caches.pop(row, None)
        else:
            self.rows.append(row)

    def _read(self, row: Generation, ids: list[int]) -> torch.Tensor:
        device = self._model.get_input_embeddings().weight.device
        with self._bank.rows([row.adapter], len(ids)):
            output = self._model(
                input_ids=torch.tensor([ids], device=device),
                past_key_values=self._caches.get(row),
                use_cache=True,
                logits_to_keep=1,
            )
        self._caches[row] = output.past_key_values
        logits_1V: torch.Tensor = output.logits[:, -1]
        return logits_1V


class SingleReading:
    """A prompt that is read in one pass."""

    def __init__(self, batch: SingleBatch, row: Generation) -> None:
        self.generations, self._batch = [row], batch

    @torch.no_grad()
    def advance(self) -> bool:
        """Read it."""
        (row,) = self.generations
        if len(row.prompt) > 1 and not row.is_over:
            self._batch._read(row, row.prompt[:-1])
        self._batch.join(row)
        return True


@contextmanager
def ready(model: Any) -> Iterator[None]:
    """Within the context, a model answers fast; see what it enters."""
    from veneer.evaluation.generation import contiguous_head_input
    from veneer.evaluation.kernel_norms import norms_by_kernel
    from veneer.model.adapters.dora import norms_kept
    from veneer.model.dense import adapter_in_copies

    with adapter_in_copies(model), norms_kept(model), contiguous_head_input(model), norms_by_kernel(model):
        yield
