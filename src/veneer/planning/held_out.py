"""Chooses the batch size of held-out rows, for the held-out loss and for `veneer evaluate`, from its memory.

Both take `evaluate.batch_size` rows if they fit, else halve it until they do. Training, `veneer evaluate` and the plan
call the same functions, so a plan shows the number that is used.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod

from veneer.engine.dry_run import DryRun, Step
from veneer.engine.trace import Peak
from veneer.model.shapes import Shapes

SPARE = 0.05  # share of the peak: fragmentation, and the error of a prediction
SLOT_STEP = 16  # positions: attention reads whole vectors, so that further masked ones change no bit
PREFILL_ROWS, PREFILL_TOKENS = 8, 4096  # most that generation reads at a time, ahead of the slots that answer them


def rows_that_fit(asked: int, peak_of: Callable[[int], Peak], persistent_bytes: int, budget_bytes: int) -> int:
    """Return the largest batch size that fits: the one asked for, halved until memory is left over; at least one.

    Args:
        asked: largest batch size.
        peak_of: function that returns the peak of so many rows, with everything held beside them.
        persistent_bytes: bytes that are held whatever their number.
        budget_bytes: bytes that may be held.
    """
    if persistent_bytes > budget_bytes:
        return 1
    rows = asked
    while rows > 1 and peak_of(rows).bytes * (1 + SPARE) > budget_bytes:
        rows //= 2
    return rows


def held_out_peak(persistent: Mapping[str, int], train: DryRun, held_out: DryRun) -> Peak:
    """Return the peak of a held-out loss within training.

    Args:
        persistent: bytes that the run holds between its passes.
        train: dry run of its micro-batch, whose recordings are held.
        held_out: dry run of the held-out batch.
    """
    parts = Counter(persistent) + Counter({"recorded passes": train.recorded_bytes})
    parts += Counter(held_out.fullest("forward").components)
    return Peak(sum(parts.values()), dict(parts))


def slot_length(tokens: int) -> int:
    """Return the positions that are held for a prompt and its answer of so many tokens together."""
    return -(-tokens // SLOT_STEP) * SLOT_STEP


def prompts_at_a_time(rows: int, tokens: int) -> int:
    """Return how many prompts of so many tokens are read at a time where so many rows are answered."""
    return max(1, min(rows, PREFILL_ROWS, PREFILL_TOKENS // max(1, tokens)))


def generation_peak(
    loaded: Mapping[str, int], shapes: Shapes, asked: Step, dry: DryRun, max_new_tokens: int, device: str
) -> Peak:
    """Return the peak of `veneer evaluate`, which answers a batch of prompts and measures the loss of references.

    Args:
        loaded: bytes of base and adapter.
        shapes: shapes of the base.
        asked: the batch, on the reference engine, since Transformers generates.
        dry: dry run of that batch.
        max_new_tokens: tokens of the longest answer; the model's positions may allow less.
        device: kind of device.
    """
    tokens = asked.length + max_new_tokens
    tokens = tokens if shapes.positions is None else min(tokens, max(shapes.positions, asked.length))
    tokens = asked.rows * slot_length(tokens)
    token_bytes = shapes.key_value_bytes * asked.dtype.itemsize // 2
    cache = token_bytes * tokens
    logits = asked.rows * shapes.vocabulary * (4 + 4 + asked.dtype.itemsize)
    # Beside the slots stand the prompts that have been read ahead; where there are no slots, a second copy of one
    # layer's keys and values while they grow.
    ahead = token_bytes * prompts_at_a_time(asked.rows, asked.length) * asked.length
    generated = {
        "generation cache": cache + max(ahead, cache // shapes.depth),
        "activations": max(dry.peaks["forward"].bytes, logits),
    }
    if device == "cuda":  # what a recorded step keeps for itself: its logits, and the largest weight dequantized
        largest = max((prod(size) for path, size in shapes.linears.items() if path in asked.quantized), default=0)
        generated["recorded passes"] = asked.dtype.itemsize * (asked.rows * shapes.vocabulary + largest)
    scored = dry.fullest("forward").components
    parts = Counter(loaded) + Counter(scored if sum(scored.values()) > sum(generated.values()) else generated)
    return Peak(sum(parts.values()), dict(parts))
