"""Chooses the placement of each tensor: the one that takes least time within a memory budget.

A pass that keeps nothing but each block's input is run once on a dummy batch as long as the longest: its peak is
measured, not computed, since only the device knows the memory of its libraries; a plan uses a dry run's peak. All else
follows from sizes, as bytes more or less than that pass holds.

Some placements are tried: each set of activations that may be offloaded, and as few streamed weights as make it fit. In
each, memory that is left is used where it saves most time. It goes first, up to half of it, to the workspace of
attention's backward over rows of one length, which is faster in one call than in many (`cudnn`), and which all blocks
share; then to the activations whose recomputation costs most time a byte, from the last block to the first, since
backward frees those first; then to 16-bit copies of 4-bit weights, which save least. The placement with the least
predicted time is taken. Of two that are equal, the one with less on the host comes first.

An activation that is kept adds its bytes to every point of a step until its block's backward, so the peak grows by no
more than the sum.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from veneer.engine.fused.block import ACTIVATIONS, OFFLOADED, Block
from veneer.engine.fused.cudnn import WORKSPACE_BYTES, Call
from veneer.engine.fused.packed import block_bytes
from veneer.engine.fused.shards import shard_bytes
from veneer.engine.fused.streaming import BUFFERS, buffer_bytes
from veneer.engine.placement import H100, ActivationState, BlockPlacement, Choice, MemoryPlacement, Rates, WeightState

SAFETY = 0.02  # share of the budget that fragmentation may take
SMALL = 2048  # tokens; shorter passes gain from replay, even those of 8B models on an H100 (`bench/replays.py`)
# Time that copies from and to the host add to what is computed meanwhile, as a share of their own. Products are slowed
# more than attention, so it is more where rows are short (H100: 0.09 for inputs and attention of 32,768 tokens, 0.45
# for attention of 2,048; `bench/memory.py`).
SLOWED = {"x": 0.1, "attention": 0.3}
SLOWED_BY_WEIGHTS = 0.1
LAUNCHING = 2e-3  # seconds the host takes to launch a block's forward and backward, unless they are replayed


@dataclass(frozen=True)
class Demand:
    """The memory of a pass that keeps nothing, measured or by a dry run.

    Attributes:
        tokens: tokens of the largest batch, as passes pad it.
        longest: tokens of its longest document.
        rows: number of its documents if cuDNN computes their attention; else 0.
        least_bytes: memory of the device at the peak of such a pass.
        pass_bytes: part of it that is freed after the pass.
        held_out_bytes: memory of a held-out loss, which comes beside recorded passes.
        varies: whether batches have several shapes.
        is_packed: whether rows are packed, so that most batches have a shape that recurs.
        base: placement of that pass, which keeps nothing.
        ends_bytes: bytes of embedding and head.
        loss_bytes: memory of the device until the loss is computed; 0: not known.
        backward_bytes: memory of the device from then on; 0: it is the least.
    """

    tokens: int
    longest: int
    rows: int
    least_bytes: int
    pass_bytes: int = 0
    held_out_bytes: int = 0
    varies: bool = False
    is_packed: bool = False
    base: MemoryPlacement | None = None
    ends_bytes: int = 0
    loss_bytes: int = 0
    backward_bytes: int = 0


def block_placement(
    keep: Collection[str],
    weights: Collection[str] = (),
    block: Block | None = None,
    host: Collection[str] = (),
    streams: bool = False,
) -> BlockPlacement:
    """Return the placement of a block that keeps some activations, offloads some, and recomputes the others.

    Args:
        keep: names of ACTIVATIONS.
        weights: names of weights that are kept dequantized.
        block: the block, whose other 4-bit weights stay as they are; None: only `weights` are listed.
        host: names of OFFLOADED; those in `keep` are kept.
        streams: whether the block's other 4-bit weights are streamed.
    """
    states = dict.fromkeys(ACTIVATIONS, ActivationState.RECOMPUTE) | {"x": ActivationState.KEEP}
    states |= dict.fromkeys(host, ActivationState.HOST) | dict.fromkeys(keep, ActivationState.KEEP)
    groups = {} if block is None else block.weights
    state = WeightState.STREAMED if streams else WeightState.NF4
    if block is not None and block.shards > 1:
        state = WeightState.SHARDED
    held = {name: state for name, group in groups.items() if group.is_quantized}
    return BlockPlacement(states, held | dict.fromkeys(weights, WeightState.DEQUANTIZED))


def uniform(
    blocks: Sequence[Block], keep: Collection[str] = ACTIVATIONS, keep_last: Collection[str] = ACTIVATIONS
) -> MemoryPlacement:
    """Return a placement in which all blocks but the last are alike; backward needs the last one's at once."""
    chosen = [block_placement(keep, block=block) for block in blocks[:-1]]
    last = block_placement(keep_last, block=blocks[-1])
    return MemoryPlacement((*chosen, last), WORKSPACE_BYTES)


def tightest(blocks: Sequence[Block], host: Collection[str] = OFFLOADED[:1], streams: bool = True) -> MemoryPlacement:
    """Return the placement with the least on the device: inputs of blocks, and weights, are on the host."""
    chosen = tuple(
        block_placement((), block=block, host=host, streams=streams and can_stream(block)) for block in blocks
    )
    return MemoryPlacement(chosen, WORKSPACE_BYTES, streams_ends=streams)


def checkpointed(blocks: Sequence[Block], gradient_checkpointing: bool | str) -> MemoryPlacement:
    """Return the placement that `train.gradient_checkpointing` asks for; auto begins as true."""
    return uniform(blocks, ACTIVATIONS if gradient_checkpointing is False else ())


def can_stream(block: Block) -> bool:
    """Return whether a block's weights can be streamed from the host: all are in 4 bits, and not spread over GPUs."""
    return block.is_packed and block.shards == 1


def choose_placement(
    blocks: Sequence[Block], demand: Demand, budget_bytes: int, records: bool, rates: Rates = H100
) -> MemoryPlacement:
    """Return the placement with the least predicted time within a budget; the tightest one where none fits.

    Recorded passes never free their memory, and a pass of another shape needs its own beside it. Where shapes vary,
    passes are recorded only if everything fits twice. Else activations make better use of the memory, except where
    passes are so small that the host takes longer to launch them than the GPU to compute: these get half of it. Uneven
    rows that are not packed hardly recur; their passes are launched if that takes the host much less time than the GPU
    needs. Passes with streamed weights are not recorded.

    Args:
        blocks: blocks of the model.
        demand: memory of a pass that keeps nothing.
        budget_bytes: memory of the device for tensors, those allocated now included.
        records: whether passes can be recorded.
        rates: speeds of the device.
    """
    search = _Search(blocks, demand, budget_bytes, rates, records)
    spare = budget_bytes - demand.least_bytes - demand.held_out_bytes
    found = search.best(spare)
    records = records and not found.streams
    if records and demand.varies and not demand.is_packed:
        records = not search.hides_launching(found)
    if records and demand.varies:
        everything = sum(block.saved_bytes(name, demand.tokens) for block in blocks for name in ACTIVATIONS)
        second = spare - demand.pass_bytes  # memory left beside a second pass
        if found.bytes + everything > second:
            records = second > 0 and demand.tokens < SMALL
            found = search.fill(Candidate(), second // 2) if records else found
    return replace(found, records_passes=records, least_bytes=demand.least_bytes, budget_bytes=budget_bytes)


class Candidate(NamedTuple):
    """What a placement has on the host.

    Attributes:
        host: names of OFFLOADED, of all blocks that do not keep them.
        streamed: number of blocks whose weights are streamed.
        streams_ends: whether embedding and head are on the host.
    """

    host: tuple[str, ...] = ()
    streamed: int = 0
    streams_ends: bool = False


class _Search:
    """The search for a placement; all bytes are relative to a pass with `demand.base`."""

    def __init__(self, blocks: Sequence[Block], demand: Demand, budget_bytes: int, rates: Rates, records: bool) -> None:
        self._blocks, self._demand, self._budget, self._rates = blocks, demand, budget_bytes, rates
        self._records = records
        tokens, longest = demand.tokens, demand.longest
        names = ("x", *ACTIVATIONS)
        self._sizes = [{name: block.saved_bytes(name, tokens) for name in names} for block in blocks]
        self._costs = [
            {name: 2 * block.recompute_cost(name, tokens, longest) / rates.flops for name in ACTIVATIONS}
            for block in blocks
        ]
        self._packed = [block_bytes(block.groups) if can_stream(block) else 0 for block in blocks]
        # Forward and backward each have all products, and attention's backward takes more than its forward.
        products = [2 * tokens * sum(group.size for group in block.groups) / rates.flops for block in blocks]
        attention = [costs["attention"] for costs in self._costs]
        self._forward = sum(products) + sum(attention)
        self._backward = sum(products) + 2.5 * sum(attention)
        base = demand.base
        self._base_bytes = self._bytes(Candidate(), {}) if base is None else self._bytes_of(base)

    def best(self, spare: int) -> MemoryPlacement:
        """Return the fastest placement that fits; the tightest where none does."""
        plain = self.fill(Candidate(), spare)
        everything = len(ACTIVATIONS) * len(self._blocks)
        if plain.bytes <= spare and sum(len(block.kept) for block in plain.blocks) == everything:
            return plain
        found = [plain, *(self.fill(candidate, spare) for candidate in self._candidates(spare))]
        found = [one for one in found if one.host_bytes <= self._rates.host_bytes]
        for limit in (spare - int(SAFETY * self._budget), spare):
            if fitting := [one for one in found if one.bytes <= limit]:
                return min(fitting, key=self._seconds)
        return self.fill(self._tightest(), spare)

    def _tightest(self) -> Candidate:
        streamed = sum(map(bool, self._packed))
        return Candidate(OFFLOADED[:1], streamed, bool(streamed and self._demand.ends_bytes))

    def _candidates(self, spare: int) -> list[Candidate]:
        """Return candidates that fit, each with as few streamed weights as that takes."""
        block = self._blocks[0]
        if block.decoder.softcap and not block.attention.depends_on_shapes(block.decoder.norm.weight_D):
            return []  # FlexAttention's tensors belong to autograd
        found = []
        for host in ((), *(OFFLOADED[:count] for count in range(1, len(OFFLOADED) + 1))):
            for ends in (False, True) if self._demand.ends_bytes else (False,):
                streamed = next(
                    (n for n in range(len(self._blocks) + 1) if self._fits(Candidate(host, n, ends), spare)), None
                )
                if streamed is not None and (host or streamed or ends):
                    found.append(Candidate(host, streamed, ends))
        return found

    def _fits(self, candidate: Candidate, spare: int) -> bool:
        if candidate.streamed > sum(map(bool, self._packed)):
            return False
        return self._bytes(candidate, {}) - self._base_bytes <= spare - int(SAFETY * self._budget)

    def _bytes(self, candidate: Candidate, keep: dict[int, set[str]]) -> int:
        """Return the bytes of what differs between placements: blocks' activations, 4-bit weights, the ends."""
        total = self._excess(candidate.streams_ends) + (0 if candidate.streams_ends else self._demand.ends_bytes)
        for name in ("x", *ACTIVATIONS):
            kept = [sizes[name] for number, sizes in enumerate(self._sizes) if name in keep.get(number, ())]
            total += sum(kept)
            largest = max(sizes[name] for sizes in self._sizes)
            if name == "x" and name not in candidate.host:
                total += sum(sizes[name] for sizes in self._sizes) - sum(kept)
            elif name in candidate.host and len(kept) < len(self._blocks):
                # One that is used and one on its way; the former is there without offloading too, but for x.
                total += largest * (2 if name == "x" else 1)
        streamed = self._streamed(candidate.streamed)
        total += sum(packed for number, packed in enumerate(self._packed) if number not in streamed)
        return total + (BUFFERS * max(self._packed) if streamed else 0)

    def _excess(self, streams_ends: bool) -> int:
        """Return the bytes that a pass holds more before its loss is known, with the head's copy, than after it."""
        if not self._demand.loss_bytes:
            return 0
        head = self._blocks[0].decoder.head.weight.nbytes
        has_copy = self._demand.base is not None and self._demand.base.streams_ends
        loss = self._demand.loss_bytes + (head if streams_ends else 0) - (head if has_copy else 0)
        return max(0, loss - (self._demand.backward_bytes or self._demand.least_bytes))

    def _bytes_of(self, placement: MemoryPlacement) -> int:
        """Return the same of a placement that keeps nothing."""
        streamed = sum(block.streams for block in placement.blocks)
        return self._bytes(Candidate(tuple(placement.blocks[0].hosted), streamed, placement.streams_ends), {})

    def _streamed(self, count: int) -> frozenset[int]:
        """Return so many blocks, evenly spread: a block that is not streamed gives the link time for the next."""
        able = [number for number, packed in enumerate(self._packed) if packed]
        return frozenset(able[turn * len(able) // count] for turn in range(count))

    def fill(self, candidate: Candidate, spare: int) -> MemoryPlacement:
        """Return the placement that fills the memory left beside a candidate."""
        before = self._bytes(candidate, {}) - self._base_bytes
        left = spare - int(SAFETY * self._budget)
        workspace, used = _workspace(self._blocks[0], self._demand, (left - before) // 2)
        keep: dict[int, set[str]] = {number: set() for number in range(len(self._blocks))}
        wishes = []
        for number in keep:
            for name in (*ACTIVATIONS, *candidate.host[:1]):
                size = self._sizes[number][name]
                wishes.append((-self._saved_by_keeping(number, name, candidate) / size, -number, name, size))
        used += before
        for minus_saved, minus, name, size in sorted(wishes):
            if size <= left - used and minus_saved < 0:
                keep[-minus].add(name)
                used += size
        streamed = self._streamed(candidate.streamed)
        dequantize: dict[int, set[str]] = {number: set() for number in keep}
        for number in reversed(keep):
            if number in streamed or self._blocks[number].shards > 1:
                continue
            for name, group in self._blocks[number].weights.items():
                size = group.size * self._blocks[number].dtype.itemsize
                if group.is_quantized and size <= left - used:
                    dequantize[number].add(name)
                    used += size
        used += self._bytes(candidate, keep) - self._bytes(candidate, {}) - self._sum(keep)
        placed = tuple(
            block_placement(keep[number], dequantize[number], block, candidate.host, number in streamed)
            for number, block in enumerate(self._blocks)
        )
        return self._described(MemoryPlacement(placed, workspace, bytes=used, streams_ends=candidate.streams_ends))

    def _sum(self, keep: dict[int, set[str]]) -> int:
        return sum(self._sizes[number][name] for number, names in keep.items() for name in names)

    def _saved_by_keeping(self, number: int, name: str, candidate: Candidate) -> float:
        """Return the time that keeping an activation saves, over what becomes of it otherwise."""
        if name in candidate.host:
            return self._copied(name, self._sizes[number][name])
        return self._costs[number][name]

    def _copied(self, name: str, size: int) -> float:
        """Return the time that a copy to the host and back, or twice from it, adds to what is computed meanwhile."""
        return SLOWED.get(name, SLOWED_BY_WEIGHTS) * 2 * size / self._rates.link

    def _described(self, placement: MemoryPlacement) -> MemoryPlacement:
        """Add what the host holds, and what each choice takes and saves."""
        choices, host_bytes = [], self._demand.ends_bytes if placement.streams_ends else 0
        for name in ("x", *ACTIVATIONS):
            for state in ActivationState:
                numbers = [n for n, block in enumerate(placement.blocks) if block.activations[name] == state]
                if not numbers:
                    continue
                size, on_host = sum(self._sizes[n][name] for n in numbers), state == ActivationState.HOST
                saved = 0.0 if name == "x" else sum(self._costs[n][name] for n in numbers)
                saved -= self._copied(name, size) if on_host else 0.0
                choices.append(
                    Choice(
                        name, state.value, len(numbers), size if state == ActivationState.KEEP else 0,
                        size if on_host else 0, 0.0 if state == ActivationState.RECOMPUTE else saved,
                    )
                )  # fmt: skip
                host_bytes += size if on_host else 0
        streamed = [number for number, block in enumerate(placement.blocks) if block.streams]
        host_bytes += sum(self._packed[number] for number in streamed)
        found = replace(placement, host_bytes=host_bytes)
        waits = self._link_seconds(found)
        if streamed:
            packed = sum(self._packed[number] for number in streamed)
            choices.append(Choice("4-bit weights", WeightState.STREAMED.value, len(streamed), 0, packed, -waits))
        if sharded := [block for block in self._blocks if block.shards > 1]:
            held = shard_bytes(sharded) + buffer_bytes(sharded)
            choices.append(Choice("4-bit weights", WeightState.SHARDED.value, len(sharded), held, 0, 0.0))
        if placement.streams_ends:
            ends = self._demand.ends_bytes
            choices.append(Choice("embedding and head", WeightState.STREAMED.value, 1, 0, ends, -self._head_seconds))
        return replace(found, link_seconds=waits, choices=tuple(choices))

    def _link_seconds(self, placement: MemoryPlacement) -> float:
        """Return the time that copies add to a pass: what they slow, what waits for them, and the head's copy."""
        hosted = [(name, number) for number, block in enumerate(placement.blocks) for name in block.hosted]
        offloaded = sum(self._sizes[number][name] for name, number in hosted)
        slowed = sum(self._copied(name, self._sizes[number][name]) for name, number in hosted)
        packed = sum(self._packed[number] for number, block in enumerate(placement.blocks) if block.streams)
        link = self._rates.link
        waits = max(0.0, max(offloaded, packed) / link - self._forward)
        waits += max(0.0, (offloaded + packed) / link - self._backward - self._recomputed(placement))
        head = self._head_seconds if placement.streams_ends else 0.0
        return waits + slowed + self._copied("4-bit weights", packed) + head

    @property
    def _head_seconds(self) -> float:
        """The time of the head's copy, which nothing hides; of the embedding only the rows that are read come over."""
        return float(self._blocks[0].decoder.head.weight.nbytes / self._rates.link)

    def _recomputed(self, placement: MemoryPlacement) -> float:
        return sum(
            self._costs[number][name]
            for number, block in enumerate(placement.blocks)
            for name in ACTIVATIONS
            if block.activations[name] == ActivationState.RECOMPUTE
        )

    def hides_launching(self, placement: MemoryPlacement) -> bool:
        """Return whether the GPU computes a pass for so long that batches half as large do not wait for the host."""
        return self._on_device(placement) > 2 * LAUNCHING * len(self._blocks)

    def _on_device(self, placement: MemoryPlacement) -> float:
        return self._forward + self._backward + self._recomputed(placement) + placement.link_seconds

    def _seconds(self, placement: MemoryPlacement) -> tuple[float, int]:
        """Return the predicted time of a pass, in steps of a microsecond, and the memory of the host it takes."""
        host = LAUNCHING * len(self._blocks) if placement.streams or not self._records else 0.0
        return round(max(self._on_device(placement), host), 6), placement.host_bytes


def _workspace(block: Block, demand: Demand, left: int) -> tuple[int, int]:
    """Return the workspace of attention's backward, and the part of the memory left that it takes."""
    if not demand.rows:
        return WORKSPACE_BYTES, 0
    rows, length, heads = demand.rows, demand.longest, block.decoder.heads
    usual = Call.of(rows, length, heads, WORKSPACE_BYTES).workspace_bytes(length)
    workspace = Call.of(rows, length, heads, usual + max(0, left)).workspace_bytes(length)
    return max(workspace, WORKSPACE_BYTES), workspace - usual
